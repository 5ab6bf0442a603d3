"""What lies in a checkpoint folder: which checkpoints there are, whether one is whole and fits, its tensors.

Reading only, and without a process group: this is what a run checks before it starts, and what an export reads.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from r1mega.config import Config, ConfigError

T = TypeVar("T")

CONFIG_FILE = "config.yaml"
PROGRESS_FILE = "progress.json"
MODEL_PREFIX = "model."


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps and tokens so far. The data position follows from the step."""

    step: int
    tokens: int


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors (on the CPU) of the model in checkpoint ``path``, one at a time."""
    metadata = read_metadata(path)
    for key, stored in sorted(metadata.state_dict_metadata.items()):
        if key.startswith(MODEL_PREFIX) and isinstance(stored, TensorStorageMetadata):
            yield key.removeprefix(MODEL_PREFIX), _read_whole(path, key, stored, metadata)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The visible checkpoints in ``folder``, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step_\d+", path.name)), key=lambda path: int(path.name[5:]))


def newest_checkpoint(folder: Path) -> Path | None:
    """The visible checkpoint of the highest step."""
    return next(reversed(complete_checkpoints(folder)), None)


def remove_stale(folder: Path) -> None:
    """Remove what an interrupted save or removal has left behind."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def check(path: Path, config: Config) -> Progress:
    """Check that ``config`` can go on from checkpoint ``path``, before any process group is there.

    Raises:
        ConfigError: the checkpoint is of another model or another run's data order, or it is cut short.
    """
    difference = first_difference(read_settings(path), config.to_dict())
    if difference is not None:
        name, there, here = difference
        raise ConfigError(f"{name}={here}: must be {there}, as in the checkpoint {path} that the run goes on from")
    for name, needed in _needed_sizes(path).items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size is None or size < needed:
            found = "is missing" if size is None else f"has {size} bytes of at least {needed}"
            raise ConfigError(f"checkpoint {path} is cut short: {name} {found}; remove it to go on from an older one")
    progress, num_steps = read_progress(path), config.train.num_steps
    if progress.step > num_steps:
        raise ConfigError(f"train.num_steps={num_steps}: must be at least {progress.step}, the step of {path}")
    return progress


def read_settings(path: Path) -> dict:
    """All settings of the run that wrote checkpoint ``path``. Raises :class:`ConfigError`."""
    settings = _read_small(path, CONFIG_FILE, yaml.safe_load)
    groups = [field.name for field in fields(Config) if field.name != "rl"]  # checkpoints from before it have none
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name), dict) for name in groups):
        raise ConfigError(f"checkpoint {path} is cut short: {CONFIG_FILE} does not hold {', '.join(groups)}")
    return settings


def read_progress(path: Path) -> Progress:
    """How far the run was. Raises :class:`ConfigError`."""
    progress = _read_small(path, PROGRESS_FILE, lambda text: Progress(**json.loads(text)))
    if not all(isinstance(number, int) for number in (progress.step, progress.tokens)):
        raise ConfigError(f"checkpoint {path} is cut short: {PROGRESS_FILE} cannot be read")
    return progress


# Settings of which a run cannot have two: they decide the shapes, the loss, or which samples a step sees. The data are
# compared by what they hold (r1mega.data.identity), because files may move.
FIXED_SETTINGS = (
    "model", "data.sequence_length", "train.seed", "train.global_batch_size",
    "rl.prompts", "rl.template", "rl.group_size", "rl.minibatches",
)  # fmt: skip
DATA_SETTINGS = ("data.train", "data.tokenizer")
FREE_SETTINGS = ("model.checkpoint",)
# RL derives it from the longest prompt and completion, which may grow, and from parallel.tp.
FREE_IN_RL = ("data.sequence_length",)


def first_difference(
    there: dict, here: dict, settings: tuple[str, ...] = FIXED_SETTINGS
) -> tuple[str, object, object] | None:
    """The first of ``settings`` that differs: its dotted name and both values.

    A setting that is in one of the two only is younger, or older, than the checkpoint and tells no difference.
    """
    flat_there, flat_here = _flatten(there), _flatten(here)
    free: tuple[str, ...] = FREE_SETTINGS
    if flat_here.get("rl.prompts") is not None and flat_there.get("rl.prompts") is not None:
        free += FREE_IN_RL
    for name in (name for name in flat_here if name in flat_there):
        fixed = any(name == setting or name.startswith(f"{setting}.") for setting in settings)
        if fixed and name not in free and flat_there[name] != flat_here[name]:
            return name, flat_there[name], flat_here[name]
    return None


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_small(path: Path, name: str, parse: Callable[[str], T]) -> T:
    try:
        return parse((path / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"checkpoint {path} is cut short: {name}: {error.strerror}") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"checkpoint {path} is cut short: {name} cannot be read") from error


def _needed_sizes(path: Path) -> dict[str, int]:
    """The size that each file of the checkpoint has at least."""
    sizes: dict[str, int] = {}
    for stored in read_metadata(path).storage_data.values():
        sizes[stored.relative_path] = max(sizes.get(stored.relative_path, 0), stored.offset + stored.length)
    return sizes


def _read_whole(path: Path, key: str, stored: TensorStorageMetadata, metadata: Metadata) -> Tensor:
    whole = torch.empty(stored.size, dtype=stored.properties.dtype)
    for chunk in stored.chunks:
        where = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        with open(path / where.relative_path, "rb") as file:
            file.seek(where.offset)
            part = torch.load(io.BytesIO(file.read(where.length)), map_location="cpu", weights_only=True)
        whole[tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))] = part
    return whole


class _MetadataUnpickler(pickle.Unpickler):
    """DCP keeps its metadata as a pickle; this one makes nothing but DCP's own records out of it."""

    def find_class(self, module: str, name: str) -> object:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        is_path = module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath")
        if not (is_dtype or is_path or name in _METADATA_NAMES.get(module, ())):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


_METADATA_NAMES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}


def read_metadata(path: Path) -> Metadata:
    """DCP's table of contents. Raises :class:`ConfigError`."""
    try:
        with open(path / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise ConfigError(f"checkpoint {path} is cut short: .metadata: {error.strerror}") from error
    except Exception as error:
        raise ConfigError(f"checkpoint {path} is cut short: .metadata cannot be read ({error})") from error
    return metadata
