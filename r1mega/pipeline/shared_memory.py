"""Messages between two processes of one machine: bytes in shared memory, and a socket that says that there are some.

Each direction of a :class:`Link` is a ring of bytes that its sender makes (``memfd_create``; nothing to clean up, even
after a crash) and grows when a message does not fit, and a page with two counters, of messages that were sent and of
those that were taken, and where the messages lie. The sender copies a message into the ring, and waits only where the
ring is as large as it may be and full; the receiver copies it out. A Unix socket carries the descriptors of the memory,
a byte after each message for a receiver that sleeps, and the end of the connection when the other process dies.

Processors of x86 make stores visible in the order of the program, so that a counter is never ahead of what it counts.
Others do not: :data:`SUPPORTED` is false there.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import socket
import struct
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from torch import Tensor

SUPPORTED = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
SMALLEST_RING, LARGEST_RING = 1 << 20, 1 << 26  # bytes; a larger message has a ring of twice its size
ALIGNMENT = 64
NUM_RECORDS = 4096  # messages under way in one direction, at most
SHORTEST_PAUSE, LONGEST_PAUSE, SECONDS_BETWEEN_CALLS = 2e-5, 5e-4, 0.05  # of a sender that waits
RECORD = struct.Struct("=4q")  # of a message: name, number of the ring, place in it, length of its header
GONE, GAVE_UP = "it closed the connection, or died", "its run failed"
NO_DESCRIPTOR = "its memory could not be opened here: too many open files?"
# words of the page of a direction; what sender and receiver write has cache lines of its own
SENT, ENDED, TAKEN, FIRST_RECORD = 0, 1, 8, 16


class Link:
    """Both directions to one other process.

    Args:
        connection: a connected Unix stream socket that nothing has been sent over; belongs to the link from now on.
        timeout: seconds that :meth:`receive` waits.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._socket, self._timeout = connection, timeout
        weakref.finalize(self, connection.close)
        connection.settimeout(None)
        # with a timeout of Python's own, each receive would be two calls of the system
        seconds, part = divmod(max(timeout, 1e-3), 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(1e6 * part)))
        self._out, *descriptors = _Outbox.make()
        with suppress(ConnectionError):  # it may have failed already; the first receive or message tells
            socket.send_fds(connection, [b"\0"], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._in: _Inbox | None = None
        self._descriptors: list[int] = []  # of the other side's memory

    def send(self, name: int, header: bytes, tensors: Sequence[Tensor]) -> None:
        """Send a message; waits only where there is no room for it.

        Args:
            name: what :meth:`receive` returns of it.
            header: from which the receiver knows how many bytes follow.
            tensors: contiguous, on the CPU.

        Raises:
            ConnectionError: the other process is gone.
            TimeoutError: it did not make room.
            OSError: there is no memory, or no descriptor for it.
        """
        num_bytes = len(header) + sum(tensor.nbytes for tensor in tensors)
        if not self._out.make_room(num_bytes):
            self._look_until(lambda: self._out.make_room(num_bytes))
        self._out.put(name, header, tensors)
        self._call()

    def wait_until_taken(self) -> None:
        """Wait until the other side has taken all messages. Raises as :meth:`send` does."""
        if not self._out.is_empty():
            self._look_until(self._out.is_empty)

    def end(self) -> None:
        """Let the other side get an error, instead of what it has not taken yet and of what it waits for."""
        self._out.end()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _call(self) -> None:
        # where the socket is full, the receiver has bytes to wake up by
        try:
            self._socket.send(b"\0", socket.MSG_DONTWAIT)
        except BlockingIOError:
            pass
        except ConnectionError:
            if not self._out.is_empty():  # a receiver that was awake may have taken the last message and gone
                raise

    def _look_until(self, done: Callable[[], bool]) -> None:
        """Look again and again, ever more seldom: a receiver says nothing when it takes a message."""
        pause, start = SHORTEST_PAUSE, time.monotonic()
        next_call = start + SECONDS_BETWEEN_CALLS
        while not done():
            now = time.monotonic()
            if now > start + self._timeout:
                raise TimeoutError(f"timed out after {self._timeout:g} s")
            if now > next_call:
                self._call()  # an error, if it is gone
                next_call = now + SECONDS_BETWEEN_CALLS
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def receive(self, make: Callable[[bytes], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
        """Wait for the next message.

        Args:
            make: makes, from the header, contiguous tensors on the CPU that the message fills.

        Returns:
            Its name, and those tensors.

        Raises:
            ConnectionError: the other process is gone and no message of it is left, or it has called :meth:`end`.
            TimeoutError: nothing came.
            OSError: there is no descriptor for its memory.
        """
        if self._in is None:
            said = self._hear()
            if len(self._descriptors) < 2:
                raise ConnectionError(NO_DESCRIPTOR if said else GONE)
            self._in = _Inbox(*self._descriptors)
        while not self._in.has_message():
            if not self._hear() and not self._in.has_message():  # the last one may have come with the end
                raise ConnectionError(GAVE_UP if self._in.has_ended() else GONE)
        if self._in.has_ended():
            raise ConnectionError(GAVE_UP)
        return self._in.take(make)

    def _hear(self) -> bytes:
        """What the other side has said, once there is something; nothing once it has ended."""
        try:
            if self._in is not None:
                return self._socket.recv(4096)
            said, self._descriptors, _, _ = socket.recv_fds(self._socket, 1, 2, socket.MSG_CMSG_CLOEXEC)
            return said
        except BlockingIOError:
            raise TimeoutError(f"timed out after {self._timeout:g} s") from None
        except ConnectionResetError:
            return b""


def _map(descriptor: int) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


class _Ring:
    """Shared memory, and where it begins."""

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self.bytes = memory
        self.size = 0 if memory is None else len(memory)
        self.address = 0 if memory is None else ctypes.addressof(ctypes.c_char.from_buffer(memory))


class _Page:
    """The counters and records of one direction."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.bytes, self.words = memory, memoryview(memory).cast("q")

    @staticmethod
    def place(number: int) -> int:
        """Where the record of a message is, in bytes."""
        return 8 * FIRST_RECORD + number % NUM_RECORDS * RECORD.size


def _new(num_bytes: int) -> tuple[mmap.mmap, int]:
    """New shared memory, and its descriptor."""
    descriptor = os.memfd_create("r1mega", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, num_bytes)
        return mmap.mmap(descriptor, num_bytes), descriptor
    except OSError:
        os.close(descriptor)
        raise


class _Outbox:
    """The sender's end of one direction.

    Args:
        page: counters and records.
        rings: takes the descriptors of new rings. They have a socket of their own, which they never fill, so that
            nobody waits to send one.
    """

    def __init__(self, page: mmap.mmap, rings: socket.socket) -> None:
        self._rings = rings
        weakref.finalize(self, rings.close)
        self._page = _Page(page)
        self._ring, self._number_of_ring = _Ring(), 0
        self._next = 0  # where the next message begins, if it fits there
        self._under_way: deque[tuple[int, int]] = deque()  # of this ring: number of a message, where it begins

    @classmethod
    def make(cls) -> tuple[_Outbox, int, int]:
        """A new one, and what its :class:`_Inbox` is made of."""
        page, descriptor = _new(8 * FIRST_RECORD + NUM_RECORDS * RECORD.size)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(page, ours), descriptor, theirs.detach()

    def is_empty(self) -> bool:
        return self._page.words[SENT] == self._page.words[TAKEN]

    def end(self) -> None:
        self._page.words[ENDED] = 1

    def put(self, name: int, header: bytes, tensors: Sequence[Tensor]) -> None:
        """Send what :meth:`make_room` made room for."""
        number, place = self._page.words[SENT], self._next
        assert self._ring.bytes is not None
        end = place + len(header)
        self._ring.bytes[place:end] = header
        for tensor in tensors:
            ctypes.memmove(self._ring.address + end, tensor.data_ptr(), tensor.nbytes)
            end += tensor.nbytes
        self._under_way.append((number, place))
        self._next = -(-end // ALIGNMENT) * ALIGNMENT
        RECORD.pack_into(self._page.bytes, _Page.place(number), name, self._number_of_ring, place, len(header))
        self._page.words[SENT] = number + 1

    def make_room(self, num_bytes: int) -> bool:
        """Let the next message begin where there is room for so many bytes; False where there is none yet."""
        taken = self._page.words[TAKEN]
        if self._page.words[SENT] - taken >= NUM_RECORDS:
            return False
        place = self._place(num_bytes, taken)
        if place is None:
            if self._ring.size >= max(LARGEST_RING, num_bytes):
                return False
            self._grow(num_bytes)
            place = 0
        self._next = place
        return True

    def _place(self, num_bytes: int, taken: int) -> int | None:
        """Where in the ring there is room."""
        under_way, size = self._under_way, self._ring.size
        while under_way and under_way[0][0] < taken:
            under_way.popleft()
        if not under_way:
            return 0 if num_bytes <= size else None  # where the cache is warm
        oldest = under_way[0][1]
        # messages lie from the oldest to `next`, or from there over the end of the ring
        free_to = size if self._next > oldest else oldest
        if self._next + num_bytes <= free_to:
            return self._next
        return 0 if free_to == size and num_bytes <= oldest else None

    def _grow(self, num_bytes: int) -> None:
        # messages in the old ring stay there: the receiver has it until it takes one of the new ring
        memory, descriptor = _new(max(SMALLEST_RING, min(2 * self._ring.size, LARGEST_RING), 2 * num_bytes))
        try:
            socket.send_fds(self._rings, [b"\0"], [descriptor])
        finally:
            os.close(descriptor)
        self._ring = _Ring(memory)
        self._number_of_ring += 1
        self._under_way.clear()


class _Inbox:
    """The receiver's end; of descriptors that came from the sender."""

    def __init__(self, page: int, rings: int) -> None:
        self._page, self._rings = _Page(_map(page)), socket.socket(fileno=rings)
        weakref.finalize(self, self._rings.close)
        self._ring, self._number_of_ring = _Ring(), 0

    def has_message(self) -> bool:
        return self._page.words[SENT] > self._page.words[TAKEN]

    def has_ended(self) -> bool:
        return bool(self._page.words[ENDED])

    def take(self, make: Callable[[bytes], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
        taken = self._page.words[TAKEN]
        name, ring, place, header_bytes = RECORD.unpack_from(self._page.bytes, _Page.place(taken))
        while self._number_of_ring < ring:  # it was sent before the record was written
            _, descriptors, _, _ = socket.recv_fds(self._rings, 1, 1, socket.MSG_CMSG_CLOEXEC)
            if not descriptors:
                raise ConnectionError(NO_DESCRIPTOR)
            self._ring = _Ring(_map(descriptors[0]))
            self._number_of_ring += 1
        assert self._ring.bytes is not None
        end = place + header_bytes
        tensors = make(self._ring.bytes[place:end])
        for tensor in tensors:
            ctypes.memmove(tensor.data_ptr(), self._ring.address + end, tensor.nbytes)
            end += tensor.nbytes
        self._page.words[TAKEN] = taken + 1
        return name, tensors
