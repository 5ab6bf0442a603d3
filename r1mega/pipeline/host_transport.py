"""Moves the messages of a schedule between ranks of one machine, through shared memory.

gloo takes some 0.4 ms of CPU time for a message, however small, and as long to wake the receiver; this takes about a
tenth (``benchmarks/pipeline_overhead.py``). It moves tensors on the CPU; between machines, and for tensors on a GPU,
there is :mod:`r1mega.pipeline.transport`.
"""

from __future__ import annotations

import os
import socket
import struct
import uuid
from collections import deque
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

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

    def start(self, program: Program) -> None:
        self._expected = {source: deque(messages) for source, messages in program.incoming.items()}
        self._arrived.clear()

    def send(self, message: Message, tensors: tuple[Tensor, ...]) -> None:
        header = header_bytes(tuple(map(Spec.of, tensors)))
        try:
            self._links[message.destination].send(_name(message), header, [_dense(tensor) for tensor in tensors])
        except ConnectionError as error:
            raise PeerError(message.destination, f"could not send {message} to", error) from error

    def receive(self, message: Message, acknowledged: int) -> tuple[Tensor, ...]:
        peer = message.source
        while message not in self._arrived:
            first = self._expected[peer].popleft()
            try:
                name, self._arrived[first] = self._links[peer].receive(_empty)
            except (ConnectionError, TimeoutError) as error:
                raise PeerError(peer, f"waited for {first} from", error) from error
            if name != _name(first):
                raise PeerError(peer, f"waited for {first} from", RuntimeError("it sent another message"))
        return self._arrived.pop(message)

    def finish(self) -> None:
        """Nothing waits: what was sent lies in memory that the receiver has."""


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


def connect(group: dist.ProcessGroup) -> HostTransport | None:
    """A transport over ``group``; None, on every rank, where its ranks cannot all reach each other's memory.

    A collective call. Connections are taken from ranks of the group alone: names are drawn at random and travel through
    the group, and the kernel says whose processes the callers are.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = uuid.uuid4().bytes
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        if SUPPORTED:
            listener.bind(_address(mine))
            listener.listen(num_ranks)
        machines, names = _everyones(_machine() + mine, group)
        if not SUPPORTED or len(set(machines)) > 1:
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
    """16 bytes that tell this boot of this machine from all others."""
    if not SUPPORTED:
        return bytes(16)
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes


def _everyones(mine: bytes, group: dist.ProcessGroup) -> tuple[list[bytes], list[bytes]]:
    """The first and the second 16 bytes of every rank."""
    rows = all_gather(torch.tensor([list(mine)], dtype=torch.uint8), group).tolist()
    return [bytes(row[:16]) for row in rows], [bytes(row[16:]) for row in rows]


def _call(address: str, greeting: bytes) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address)
        connection.sendall(greeting)
    except OSError:  # in another container, for example
        connection.close()
        return None
    return connection


def _caller(connection: socket.socket, names: list[bytes]) -> int | None:
    """The rank that called; None for a process that is none."""
    given = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    connection.settimeout(SECONDS_TO_CONNECT)
    greeting = connection.recv(GREETING.size, socket.MSG_WAITALL)
    if CREDENTIALS.unpack(given)[1] != os.getuid() or len(greeting) != GREETING.size:
        return None
    rank, name = GREETING.unpack(greeting)
    return rank if 0 <= rank < len(names) and names[rank] == name else None


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """How long collectives of the group wait."""
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return timeout
