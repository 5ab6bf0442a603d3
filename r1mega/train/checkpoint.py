"""Checkpoints: PyTorch's distributed checkpoint (DCP), written in the background, complete or invisible.

A checkpoint is a folder ``step_00000050`` with one file a rank, DCP's ``.metadata``, the run's ``config.yaml`` and
``progress.json``. It is written as ``.step_00000050.tmp`` and renamed by rank 0 once every rank has written and synced
its file. Tensors are saved by name and position in the whole, so any layout can load what any other has saved.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from r1mega.config import Config
from r1mega.files import sync, write_whole
from r1mega.settings import dump_config
from r1mega.train.checkpoint_files import (
    CONFIG_FILE,
    PROGRESS_FILE,
    Progress,
    check,
    complete_checkpoints,
    newest_checkpoint,
    read_metadata,
    read_progress,
    read_tensors,
)

__all__ = [
    "CONFIG_FILE",
    "CheckpointError",
    "Checkpointer",
    "Progress",
    "check",
    "complete_checkpoints",
    "load",
    "newest_checkpoint",
    "read_tensors",
    "reason",
]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. The message is one line, fit to be shown to a user as it is."""


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
        writer = _Writer(temporary)
        written = dcp.async_save(dict(tensors), storage_writer=writer, process_group=self._group)
        assert isinstance(written, Future)
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
                sync(temporary)
                os.rename(temporary, path)
                sync(self._folder)
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


def reason(error: BaseException) -> str:
    """The cause of a failed save or load as one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {reason(failure)}"
    cause: BaseException | None = error
    while cause is not None:
        # torch's writer reports a failed write as an error of its own; the system's says more.
        if isinstance(cause, OSError):
            return f"{cause.strerror or cause}"
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split()) or type(error).__name__


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, with errors that say why.

    DCP sends a rank's error to the others without the chain of causes, and torch's own words for a full disk are
    "unexpected pos 704 vs 598".
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(reason(error)) from error


class _Reader(dcp.FileSystemReader):
    """DCP's reader, with metadata read by :func:`read_metadata`."""

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        return read_metadata(Path(self.path))


def _remove(path: Path) -> None:
    """Remove a checkpoint; it is invisible from the first moment."""
    hidden = path.with_name(f".{path.name}.tmp")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
