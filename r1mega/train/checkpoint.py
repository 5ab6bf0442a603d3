"""Checkpoints: PyTorch's distributed checkpoint (DCP), written in the background, complete or invisible.

A checkpoint is a folder ``step_00000050`` with one file a rank, DCP's ``.metadata``, the run's ``config.yaml`` and
``progress.json``. It is written as ``.step_00000050.tmp`` and renamed by rank 0 once every rank has written and synced
its file. Tensors are saved by name and position in the whole, so any layout can load what any other has saved.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from r1mega.config import Config, ConfigError
from r1mega.settings import dump_config
from r1mega.train.files import sync_folder, write_whole

CONFIG_FILE = "config.yaml"
PROGRESS_FILE = "progress.json"
MODEL_PREFIX = "model."


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message is one line, fit to be shown to a user as it is."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps and tokens so far. The data position follows from the step."""

    step: int
    tokens: int


class Checkpointer:
    """Writes checkpoints of one run. Building it is a collective call, and so is :meth:`save`.

    Args:
        folder: where the checkpoints are; made if it is not there.
        config: kept in each checkpoint; ``train.keep_checkpoints`` says how many of the newest stay.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._config = config
        self._is_first = dist.get_rank() == 0
        # The background thread must not share a group with the training, whose messages it would overtake.
        self._group = dist.new_group(backend="gloo")
        self._pending: Future[None] | None = None
        self._name = ""

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` and write them in the background; waits for the checkpoint before this one.

        Args:
            progress: where the run is.
            tensors: by unique name; DTensors, or plain tensors that are equal on all ranks that have them.

        Raises:
            CheckpointError: the checkpoint before this one, or the start of this one, failed.
        """
        self.finish()
        self._name = f"step_{progress.step:08d}"
        self._pending = Future()
        temporary = self._folder / f".{self._name}.tmp"
        writer = dcp.FileSystemWriter(temporary)
        written = dcp.async_save(dict(tensors), storage_writer=writer, process_group=self._group)
        written.add_done_callback(partial(self._publish, self._folder / self._name, progress, self._pending))

    def failed(self) -> bool:
        """Whether the checkpoint under way is known to have failed on this rank; :meth:`finish` then says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Wait until the checkpoint under way is visible. A collective call.

        Raises:
            CheckpointError: it failed; raised on every rank, wherever the cause was.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        failures = torch.tensor([int(error is not None)])
        dist.all_reduce(failures, group=self._group)
        if failures.item():
            survivor = newest_checkpoint(self._folder)
            rest = f"the last complete checkpoint is {survivor}" if survivor else "there is no complete checkpoint"
            why = "on another rank" if error is None else reason(error)
            raise CheckpointError(f"checkpoint {self._folder / self._name} was not saved: {why}; {rest}")

    def _publish(self, path: Path, progress: Progress, published: Future[None], written: Future[Metadata]) -> None:
        """In the background thread: on rank 0, make the checkpoint visible, then remove those that are too old."""
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            written.result()
            if self._is_first:
                write_whole(temporary / CONFIG_FILE, dump_config(self._config))
                write_whole(temporary / PROGRESS_FILE, json.dumps(asdict(progress)))
                sync_folder(temporary)
                os.rename(temporary, path)
                sync_folder(self._folder)
                for old in complete_checkpoints(self._folder)[: -self._config.train.keep_checkpoints]:
                    _remove(old)
            published.set_result(None)
        except BaseException as error:  # noqa: BLE001 - DCP's CheckpointException is no Exception
            if self._is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            published.set_exception(error)


def load(path: Path, tensors: Mapping[str, Tensor]) -> Progress:
    """Fill ``tensors`` in place from the checkpoint ``path``, whatever layout wrote it. A collective call.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    try:
        dcp.load(dict(tensors), storage_reader=_Reader(path))
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be loaded: {reason(error)}") from error
    return read_progress(path)


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors (on the CPU) of the model in checkpoint ``path``, one at a time; needs no process group."""
    metadata = _read_metadata(path)
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
    return read_progress(path)


def read_settings(path: Path) -> dict:
    """All settings of the run that wrote checkpoint ``path``. Raises :class:`ConfigError`."""
    settings = _read_small(path, CONFIG_FILE, yaml.safe_load)
    if not isinstance(settings, dict):
        raise ConfigError(f"checkpoint {path} is cut short: {CONFIG_FILE} holds no settings")
    return settings


def read_progress(path: Path) -> Progress:
    """How far the run was. Raises :class:`ConfigError`."""
    return _read_small(path, PROGRESS_FILE, lambda text: Progress(**json.loads(text)))


# Settings of which a run cannot have two: they decide the shapes, the loss, or which samples a step sees.
FIXED_SETTINGS = ("model", "data.sequence_length", "train.seed", "train.global_batch_size")
FREE_SETTINGS = ("model.checkpoint",)


def first_difference(there: dict, here: dict) -> tuple[str, object, object] | None:
    """The first fixed setting that differs: its dotted name and both values."""
    flat_there, flat_here = _flatten(there), _flatten(here)
    for name in flat_here | flat_there:
        fixed = any(name == setting or name.startswith(f"{setting}.") for setting in FIXED_SETTINGS)
        if fixed and name not in FREE_SETTINGS and flat_there.get(name) != flat_here.get(name):
            return name, flat_there.get(name), flat_here.get(name)
    return None


def reason(error: BaseException) -> str:
    """The cause of a failed save or load as one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {reason(cause)}"
    cause: BaseException | None = error
    while cause is not None:
        # torch's writer reports a failed write as an error of its own; the system's says more.
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}"
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split()) or type(error).__name__


def _remove(path: Path) -> None:
    """Remove a checkpoint; it is invisible from the first moment."""
    hidden = path.with_name(f".{path.name}.tmp")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read_small(path: Path, name: str, parse):  # noqa: ANN001, ANN202
    try:
        return parse((path / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"checkpoint {path} is cut short: {name}: {error.strerror}") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"checkpoint {path} is cut short: {name} cannot be read") from error


def _needed_sizes(path: Path) -> dict[str, int]:
    """The size that each file of the checkpoint has at least."""
    sizes: dict[str, int] = {}
    for stored in _read_metadata(path).storage_data.values():
        sizes[stored.relative_path] = max(sizes.get(stored.relative_path, 0), stored.offset + stored.length)
    return sizes


def _read_whole(path: Path, key: str, stored: TensorStorageMetadata, metadata: Metadata) -> Tensor:
    whole = torch.empty(stored.size, dtype=stored.properties.dtype)
    for chunk in stored.chunks:
        where = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        with open(path / where.relative_path, "rb") as file:
            file.seek(where.offset)
            part = torch.load(io.BytesIO(file.read(where.length)), map_location="cpu", weights_only=True)
        whole[tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes))] = part
    return whole


class _Reader(dcp.FileSystemReader):
    """DCP's reader, with metadata read by :func:`_read_metadata`."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return _read_metadata(Path(self.path))


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


def _read_metadata(path: Path) -> Metadata:
    """DCP's table of contents. Raises :class:`ConfigError`."""
    try:
        with open(path / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise ConfigError(f"checkpoint {path} is cut short: .metadata: {error.strerror}") from error
    except Exception as error:
        raise ConfigError(f"checkpoint {path} is cut short: .metadata cannot be read ({error})") from error
    return metadata
