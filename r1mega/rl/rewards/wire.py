"""Messages between the pool, its children and their children: lines of JSON over a socket pair."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

_LONGEST_REPLY = 1 << 20  # bytes; nothing that a reward makes is allowed to fill the memory of who reads it


class Lost(Exception):
    """The other end has gone, or makes no sense."""


class Garbled(Lost):
    """The other end is there, and what it says is not a message."""


class Channel:
    """One end of a socket pair.

    Args:
        connection: the socket; closed by :meth:`close`.
        longest: bytes of the longest message to receive; None for no limit.
    """

    def __init__(self, connection: socket.socket, longest: int | None = _LONGEST_REPLY) -> None:
        self._socket = connection
        self._longest = longest
        self._buffer = bytearray()

    def send(self, message: Any, seconds: float | None = None) -> None:
        """Send a message. Raises :class:`Lost`, or :class:`TimeoutError` where it is not taken within ``seconds``."""
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError:
            raise
        except OSError as error:
            raise Lost(str(error)) from error

    def receive(self, seconds: float | None = None) -> Any:
        """The next message. Raises :class:`Lost`, or :class:`TimeoutError` where none came within ``seconds``."""
        deadline = None if seconds is None else time.monotonic() + seconds
        seen = 0
        while (end := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if self._longest is not None and seen > self._longest:
                raise Garbled("a message is too long")
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            try:
                self._socket.settimeout(left)
                block = self._socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError as error:
                raise Lost(str(error)) from error
            if not block:
                raise Lost("the other end has gone")
            self._buffer += block
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Garbled("not a message") from error

    def shut(self) -> None:
        """End the connection: the other end notices, and so does whoever waits at this one, in another thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
