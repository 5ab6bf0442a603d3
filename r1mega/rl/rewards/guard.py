"""What a reward may not do: write files, open sockets, start or signal processes.

A hook of Python's audit events (PEP 578) raises where a reward tries, and remembers it, so that the reward fails even
if it catches the error. This stops mistakes, and text of a model that some parser evaluates (sympy's does). It is no
jail: native code goes past it. Programs that a model wrote run in the sandbox only, see ``sandbox.py``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = {
    "files": (
        "os.chmod os.chown os.link os.mkdir os.remove os.rename os.rmdir os.setxattr os.removexattr os.symlink"
        " os.truncate os.utime sqlite3.connect"
    ),
    "network": (
        "socket.__new__ socket.bind socket.connect socket.getaddrinfo socket.gethostbyaddr socket.gethostbyname"
        " socket.sendmsg socket.sendto"
    ),
    "processes": (
        "os.exec os.fork os.forkpty os.kill os.killpg os.posix_spawn os.spawn os.system pty.spawn subprocess.Popen"
        " signal.pthread_kill resource.setrlimit resource.prlimit"
    ),
}
_KINDS = {event: kind for kind, events in _EVENTS.items() for event in events.split()}
_WORDS = {"files": "write a file", "network": "use the network", "processes": "start or signal a process"}


class Guard:
    """The hook of a process; it cannot be taken out again. It does something between :meth:`begin` and :meth:`end`."""

    def __init__(self) -> None:
        self._allowed: tuple[str, ...] | None = None
        self._tried: list[str] = []
        sys.addaudithook(self._see)

    def begin(self, allowed: tuple[str, ...]) -> None:
        """From now on refuse what is not ``allowed`` (``files``, ``network``, ``processes``)."""
        self._allowed = allowed

    def end(self) -> str | None:
        """Refuse nothing more; returns what was tried first (``tried to write a file: os.mkdir /tmp/x``), or None."""
        self._allowed = None
        tried, self._tried = self._tried, []
        return tried[0] if tried else None

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allowed is None:
            return
        kind = _KINDS.get(event)
        if kind is None and event == "open" and _writes(*arguments):
            kind = "files"
        if kind is None or kind in self._allowed:
            return
        what = (
            f"tried to {_WORDS[kind]}: {event} {arguments[0]!r:.80}"
            if arguments
            else f"tried to {_WORDS[kind]}: {event}"
        )
        self._tried.append(what)
        raise PermissionError(f"{what}; a reward that must is marked @reward(allow=[{kind!r}])")


def _writes(path: object, mode: object, flags: object) -> bool:
    # A number is a descriptor that is open already, such as a pipe's.
    return isinstance(flags, int) and bool(flags & _WRITING) and not isinstance(path, int) and path != os.devnull
