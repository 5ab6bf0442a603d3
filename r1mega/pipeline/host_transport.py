"""Moves the messages of a schedule between ranks of one machine, through shared memory.

With small stages most of what an executor costs is gloo: a step of 1F1B with 48 messages took 23 ms of CPU time over it
and 11 ms through shared memory, 4 of them the stages' own (``benchmarks/pipeline_overhead.py``). This moves tensors on
the CPU; between machines, and for tensors on a GPU, there is :mod:`r1mega.pipeline.transport`.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import uuid
from collections import deque
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from r1mega.collectives import all_gather
from r1mega.pipeline.actions import Kind
from r1mega.pipeline.packing import Spec, decode_bytes, header_bytes
from r1mega.pipeline.shared_memory import SUPPORTED, Link
from r1mega.pipeline.transfers import Message, Program
from r1mega.pipeline.transport import PeerError

SECONDS_TO_CONNECT = 60.0
GREETING = struct.Struct("=q16s")  # rank and name of who connects
CREDENTIALS = struct.Struct("3i")  # process, user and group, as the kernel knows them


class HostTransport:
    """The transport of ranks on one machine (see :class:`r1mega.pipeline.transport.Transport`).

    Args:
        rank: of this process in the pipeline.
        num_ranks: of the pipeline.
        links: to each other rank.
    """

    def __init__(self, rank: int, num_ranks: int, links: dict[int, Link]) -> None:
        self.rank, self.num_ranks, self._links = rank, num_ranks, links
        self._expected: dict[int, deque[Message]] = {}
        self._arrived: dict[Message, tuple[Tensor, ...]] = {}
        self._gave_up = False

    def start(self, program: Program) -> None:
        if self._gave_up:
            raise RuntimeError("an earlier run of this pipeline failed here: make a new executor on all of its ranks")
        self._expected = {source: deque(messages) for source, messages in program.incoming.items()}
        self._arrived.clear()

    def send(self, message: Message, tensors: tuple[Tensor, ...]) -> None:
        header = header_bytes(tuple(map(Spec.of, tensors)))
        try:
            self._links[message.destination].send(_name(message), header, [_dense(tensor) for tensor in tensors])
        except OSError as error:
            raise PeerError(message.destination, f"could not send {message} to", error) from error

    def receive(self, message: Message, acknowledged: int) -> tuple[Tensor, ...]:
        peer = message.source
        while message not in self._arrived:
            first = self._expected[peer].popleft()
            try:
                name, self._arrived[first] = self._links[peer].receive(_empty)
            except OSError as error:
                raise PeerError(peer, f"waited for {first} from", error) from error
            if name != _name(first):
                raise PeerError(peer, f"waited for {first} from", RuntimeError("it sent another message"))
        return self._arrived.pop(message)

    def finish(self) -> None:
        for peer, link in self._links.items():
            try:
                link.wait_until_taken()
            except OSError as error:
                raise PeerError(peer, "waited until all messages were taken by", error) from error

    def give_up(self) -> None:
        self._gave_up = True
        for link in self._links.values():
            link.end()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor as its bytes are to be read."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous()


def _empty(header: bytes) -> tuple[Tensor, ...]:
    """Tensors of the header's shapes and types, leaves of a new graph."""
    return tuple(
        torch.empty(spec.shape, dtype=spec.dtype, requires_grad=spec.requires_grad) for spec in decode_bytes(header)
    )


def _name(message: Message) -> int:
    """A number that tells one message of a run from another."""
    return (message.microbatch * (1 << 20) + message.stage) * 2 + (message.kind is Kind.F)


def connect(group: dist.ProcessGroup, schedule: str = "") -> HostTransport | None:
    """A transport over ``group``; None, on every rank, where its ranks cannot all reach each other's memory.

    A collective call. Connections are taken from ranks of the group alone: names are drawn at random and travel through
    the group, and the kernel says whose processes the other ends are.

    Args:
        group: the ranks of the pipeline, in order.
        schedule: what they will run.

    Raises:
        ValueError: it is not the same on all ranks.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = uuid.uuid4().bytes
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        machine = _machine()
        try:
            listener.bind(_address(mine))
            listener.listen(num_ranks)
        except OSError:
            machine = mine  # nobody's: nobody will call
        of_schedule = hashlib.blake2b(schedule.encode(), digest_size=16).digest()
        machines, names, schedules = _everyones((machine, mine, of_schedule), group)
        if len(set(schedules)) > 1:
            raise ValueError(
                "the ranks of this pipeline make executors of different schedules: make them in the same order on all"
            )
        if len(set(machines)) > 1:
            return None
        # callers wait in the listener's queue, so that all may call before any accepts
        called = [_call(_address(names[peer]), GREETING.pack(rank, mine)) for peer in range(rank)]
        reached = torch.tensor([all(called)], dtype=torch.uint8)
        if not all_gather(reached, group).all():
            for connection in filter(None, called):
                connection.close()
            return None
        connections = {peer: connection for peer, connection in enumerate(called) if connection is not None}
        listener.settimeout(SECONDS_TO_CONNECT)
        while len(connections) < num_ranks - 1:
            connection, _ = listener.accept()
            caller = _caller(connection, names)
            if caller is None:
                connection.close()
            else:
                connections[caller] = connection
    timeout = _timeout(group).total_seconds()
    return HostTransport(rank, num_ranks, {peer: Link(connection, timeout) for peer, connection in connections.items()})


def _address(name: bytes) -> str:
    return f"\0r1mega-{name.hex()}"  # in no folder: gone with the process


def _machine() -> bytes:
    """16 bytes that tell this boot of this machine from all others; a number of nobody's where memory is not shared."""
    with suppress(OSError, ValueError):
        if SUPPORTED:
            os.close(os.memfd_create("r1mega", os.MFD_CLOEXEC))
            return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    return uuid.uuid4().bytes


def _everyones(mine: tuple[bytes, ...], group: dist.ProcessGroup) -> list[list[bytes]]:
    """For each of these 16 bytes, those of every rank."""
    rows = all_gather(torch.tensor([list(b"".join(mine))], dtype=torch.uint8), group).tolist()
    return [[bytes(row[start : start + 16]) for row in rows] for start in range(0, 16 * len(mine), 16)]


def _call(address: str, greeting: bytes) -> socket.socket | None:
    """A connection; None where there is none to be had: in another container, or to another user's process."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with suppress(OSError):
        connection.connect(address)
        if _is_ours(connection):
            connection.sendall(greeting)
            return connection
    connection.close()
    return None


def _caller(connection: socket.socket, names: list[bytes]) -> int | None:
    """The rank that called; None for a process that is none."""
    if not _is_ours(connection):
        return None
    connection.settimeout(SECONDS_TO_CONNECT)
    greeting = connection.recv(GREETING.size, socket.MSG_WAITALL)
    if len(greeting) != GREETING.size:
        return None
    rank, name = GREETING.unpack(greeting)
    return rank if 0 <= rank < len(names) and names[rank] == name else None


def _is_ours(connection: socket.socket) -> bool:
    """Whether the process at the other end is of the same user."""
    given = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return CREDENTIALS.unpack(given)[1] == os.getuid()


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """How long collectives of the group wait."""
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)  # not in every version of PyTorch
    timeout: timedelta = default_pg_timeout if options is None else options._timeout
    return timeout
