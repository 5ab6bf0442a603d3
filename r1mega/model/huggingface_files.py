"""A folder of safetensors files: what is in it, is it whole, and parts of its tensors.

The check reads the files' headers alone and needs no torch. FP8 releases (DeepSeek-V3, -R1) keep a float32 factor for
each block of 128 x 128 in ``<name>_scale_inv``; they are multiplied back when a part is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.config import ConfigError, ModelConfig
from r1mega.model.huggingface_names import Shape, copied_tensors, huggingface_shapes, is_derived

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
BLOCK = 128
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
_LONGEST_HEADER = 100_000_000  # what safetensors itself accepts


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where it is, its type (as safetensors writes it) and its shape."""

    file: str
    dtype: str
    shape: Shape


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint by name, from the files' headers.

    Raises:
        ConfigError: a file is missing, cut short, or is not what the index says.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        return _read_header(folder, SINGLE_FILE)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.checkpoint={folder}: {INDEX_FILE} cannot be read as an index ({error!r})") from error
    entries: dict[str, Entry] = {}
    for file in files:
        if Path(file).name != file:
            raise ConfigError(f"model.checkpoint={folder}: {INDEX_FILE} names {file}, which is not in the folder")
        found = _read_header(folder, file)
        twice = next((name for name in found if name in entries), None)
        if twice is not None:
            raise ConfigError(f"model.checkpoint={folder}: {twice} is in {entries[twice].file} and in {file}")
        entries |= found
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != file:
            raise ConfigError(f"model.checkpoint={folder}: {name} is not in {file}, where {INDEX_FILE} says it is")
    return entries


def _read_header(folder: Path, file: str) -> dict[str, Entry]:
    """The tensors of one file; the file must be exactly as long as its header says."""
    try:
        size = (folder / file).stat().st_size
        with open(folder / file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ConfigError(f"model.checkpoint={folder}: {file} is cut short or not a safetensors file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {name: Entry(file, values["dtype"], tuple(values["shape"])) for name, values in header.items()}
        end = 8 + length + max((values["data_offsets"][1] for values in header.values()), default=0)
    except OSError as error:
        raise ConfigError(f"model.checkpoint={folder}: {file}: {error.strerror}") from error
    except (struct.error, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.checkpoint={folder}: {file} is cut short or not a safetensors file") from error
    if size != end:
        raise ConfigError(f"model.checkpoint={folder}: {file} is cut short: it has {size} bytes of {end}")
    for name, entry in entries.items():
        begin, stop = header[name]["data_offsets"]
        if entry.dtype in _BYTES and stop - begin != prod(entry.shape) * _BYTES[entry.dtype]:
            raise ConfigError(
                f"model.checkpoint={folder}: {file}: {name} has {stop - begin} bytes for shape {entry.shape}"
            )
    return entries


def check_entries(entries: dict[str, Entry], config: ModelConfig, folder: Path) -> None:
    """Check that a checkpoint holds exactly the tensors of the model: none missing, none left over, every shape right.

    Raises:
        ConfigError: naming the first tensor that does not fit.
    """
    expected, copies = huggingface_shapes(config), copied_tensors(config)
    missing = [name for name in expected if name not in entries]
    if missing:
        raise ConfigError(f"model.checkpoint={folder}: {missing[0]} is missing{_and_more(missing)}")
    expected |= {name: expected[source] for name, source in copies.items()}
    for name in [name for name in expected if name in entries]:
        entry = entries[name]
        if entry.shape != expected[name]:
            raise ConfigError(
                f"model.checkpoint={folder}: {name} has shape {entry.shape}, the model's is {expected[name]}"
            )
        if entry.dtype not in _BYTES:
            raise ConfigError(f"model.checkpoint={folder}: {name} is {entry.dtype}; must be one of {', '.join(_BYTES)}")
        if entry.dtype == "F8_E4M3":
            expected = expected | _check_scale(name, entries, folder)
    left_over = [name for name in entries if name not in expected and not is_derived(name)]
    if left_over:
        raise ConfigError(f"model.checkpoint={folder}: {left_over[0]} has no place in the model{_and_more(left_over)}")


def _check_scale(name: str, entries: dict[str, Entry], folder: Path) -> dict[str, Shape]:
    """The block factors of an FP8 tensor must be there; returns their name and shape."""
    scale, shape = name + SCALE_SUFFIX, tuple(-(-size // BLOCK) for size in entries[name].shape)
    entry = entries.get(scale)
    if entry is None or entry.shape != shape or entry.dtype != "F32":
        found = "is missing" if entry is None else f"is {entry.dtype} of shape {entry.shape}"
        raise ConfigError(f"model.checkpoint={folder}: {scale} {found}; must be F32 of shape {shape}, as {name} is FP8")
    return {scale: shape}


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more tensors" if len(names) > 1 else ""


class TensorReader:
    """Reads parts of the tensors of a checkpoint; a context manager. Files are mapped, not read whole.

    Args:
        folder: the checkpoint.
        entries: of :func:`read_entries`.
    """

    def __init__(self, folder: Path, entries: dict[str, Entry]) -> None:
        self.folder, self.entries = folder, entries
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, name: str, slices: Iterable[slice]) -> Tensor:
        """The part ``slices`` (start and stop in each dimension) of a tensor; FP8 comes back as float32."""
        entry, slices = self.entries[name], tuple(slices)
        if entry.dtype != "F8_E4M3":
            return self._open(entry.file).get_slice(name)[slices]
        import torch

        part = self._open(entry.file).get_slice(name)[slices].to(torch.float32)
        blocks = tuple(slice(s.start // BLOCK, -(-s.stop // BLOCK)) for s in slices)
        scale = self._open(self.entries[name + SCALE_SUFFIX].file).get_slice(name + SCALE_SUFFIX)[blocks]
        for dim, s in enumerate(slices):
            start = s.start - s.start // BLOCK * BLOCK
            scale = scale.repeat_interleave(BLOCK, dim=dim).narrow(dim, start, s.stop - s.start)
        return part * scale

    def _open(self, file: str) -> Any:
        if file not in self._files:
            from safetensors import safe_open

            self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt", device="cpu"))
        return self._files[file]
