"""Files written whole or not at all: folders that appear complete, and cached arrays on top of them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy

from r1mega.files import sync

_LOCK = ".lock"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path | None]:
    """Fill a folder that appears under its name only when it is complete.

    Yields the folder to fill, which is ``.NAME.partial`` beside ``target``; when the block ends it is flushed to disk
    and renamed. Yields None where ``target`` is there already. An error inside the block leaves nothing behind; what
    a killed process left is cleared by the next one. Of several processes one fills the folder while the others wait
    for it; a lock that the kernel drops with its process guards this, so that a dead process keeps nobody waiting.
    """
    partial = target.with_name(f".{target.name}.partial")
    lock = _lock_folder(partial, target)
    if lock is None:
        yield None
        return
    with lock:
        _clear(partial)
        try:
            yield partial
        except BaseException:
            _remove(partial)
            raise
        for path in sorted(partial.iterdir()):
            sync(path)
        # The lock goes last: until the folder has its name, whoever opens the lock must find this one and wait.
        os.rename(partial, target)
        (target / _LOCK).unlink()
        sync(target.parent)


def _lock_folder(partial: Path, target: Path) -> IO[bytes] | None:
    """The open lock file of ``partial``, or None as soon as ``target`` is there."""
    while not target.exists():
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            # Renamed or removed between the call and pathlib's look at what is in the way; or it is a file.
            if partial.exists() and not partial.is_dir():
                raise
            continue
        try:
            # Closed by the caller, which drops the lock.
            lock = open(partial / _LOCK, "ab")  # noqa: SIM115
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            # Whoever held the lock before may have renamed or removed the folder: then this lock guards nothing.
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(partial / _LOCK)):
                if not target.exists():
                    return lock
                # It appeared between the look at the top and the lock.
                _remove(partial)
        except FileNotFoundError:
            pass
        lock.close()
    return None


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _remove(folder: Path) -> None:
    """Remove a folder whose lock is held; a process that takes a new lock on the way keeps it."""
    _clear(folder)
    (folder / _LOCK).unlink()
    with suppress(OSError):
        folder.rmdir()


def cached_arrays(folder: Path, key: str, build: Callable[[], dict[str, numpy.ndarray]]) -> dict[str, numpy.ndarray]:
    """The arrays under ``folder/key``, memory-mapped; ``build`` makes them where they are not there yet.

    ``key`` must say everything that the arrays depend on. Raises OSError where the folder cannot be written.
    """
    target = folder / key
    with whole_folder(target) as partial:
        if partial is not None:
            for name, array in build().items():
                numpy.save(partial / f"{name}.npy", array, allow_pickle=False)
    return {path.stem: numpy.load(path, mmap_mode="r", allow_pickle=False) for path in target.glob("*.npy")}
