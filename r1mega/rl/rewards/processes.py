"""Processes that leave nothing behind. What only Linux has is left out elsewhere; process groups are everywhere."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LONGEST_DEATH = 10.0  # seconds; a killed process that waits for a disk may take its time


def adopt_orphans() -> None:
    """Make the calling process the parent of every descendant whose own parent ends, in whatever session that is."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the calling process killed when its parent (``parent``, to see that it is still alive) ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def descendants(process: int) -> list[int]:
    """All processes below ``process`` in the tree; none where the system does not tell."""
    found, waiting = [], [process]
    while waiting:
        children = _children(waiting.pop())
        found += children
        waiting += children
    return found


def kill_children(group: int | None = None) -> None:
    """Kill and reap every process below the calling one.

    Args:
        group: a process group to kill as well, for systems that do not list children.

    The caller must :func:`adopt_orphans`, or what has left its group escapes.
    """
    deadline = time.monotonic() + _LONGEST_DEATH
    while time.monotonic() < deadline:
        for process in descendants(os.getpid()):
            kill(process)
        if group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        if not reap():
            return
        time.sleep(0.001)


def kill_tree(process: int) -> None:
    """Kill ``process``, its process group and all below it; the caller reaps ``process``, which is its child."""
    below = descendants(process)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    for other in (process, *below):
        kill(other)


def kill(process: int) -> None:
    """SIGKILL; no error where the process has gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGKILL)


def reap(patience: float = 0.0) -> bool:
    """Collect all children of the calling process that end within ``patience`` seconds; whether some are alive."""
    deadline = time.monotonic() + patience
    try:
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if time.monotonic() >= deadline:
                return True
            time.sleep(0.001)
    except ChildProcessError:
        return False


def wait(process: int, seconds: float) -> int | None:
    """The wait status of a child that ends within ``seconds``; None where it does not."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return status
            if time.monotonic() >= deadline:
                break
            time.sleep(0.001)
    return None


def _children(process: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                found += map(int, file.read().split())
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
