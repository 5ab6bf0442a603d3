"""Moves the messages of a schedule between ranks, over torch.distributed point-to-point.

Activations travel as one message, header in front (:mod:`r1mega.pipeline.packing`): the receiver guesses that they are
as long as the last ones from that stage, and the sender, who knows the guess, sends what does not fit as a second one.
Gradients need no header: they look like the activations that went the other way.

On a GPU the header goes through a gloo group (so that no rank waits for its own GPU to read it), the rest through NCCL,
where each direction has a group of its own: in one group a send and a receive between the same two ranks would have to
be issued in the same order on both.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.pipeline.actions import Kind
from r1mega.pipeline.packing import HEADER_BYTES, Spec, Specs, decode_header, encode_header, layout, pack, unpack
from r1mega.pipeline.transfers import Message, Program

# So many works that are done are kept for a while: dropping them at once, gloo's thread perhaps still busy with them,
# costs CPU time. Measured: a quarter less for GPipe on 2 ranks; less on 4 ranks, and nothing in 1F1B.
# A work holds its tensor, so only those of small ones are kept.
NUM_KEPT_WORKS, KEPT_BYTES = 4, 1 << 14

Flight = tuple[list[dist.Work], list[Tensor]]  # what is under way, and the buffers that must live until it is done


class PeerError(RuntimeError):
    """A message did not come, or was not taken. ``peer`` is the other rank."""

    def __init__(self, peer: int, what: str, error: Exception) -> None:
        super().__init__(f"{what} rank {peer}: {error}")
        self.peer = peer


class Transport(Protocol):
    """What the executor asks of the wire. Tensors that are handed over must not be changed afterwards.

    Attributes:
        rank: of this process in the pipeline.
        num_ranks: of the pipeline.
    """

    rank: int
    num_ranks: int

    def start(self, program: Program) -> None:
        """Prepare for one run of ``program``."""

    def send(self, message: Message, tensors: tuple[Tensor, ...]) -> None:
        """Send without waiting."""

    def receive(self, message: Message, acknowledged: int) -> tuple[Tensor, ...]:
        """Wait for the tensors of ``message``; so many messages to its source have been received there."""

    def finish(self) -> None:
        """Wait until all that was sent has been received."""

    def give_up(self) -> None:
        """A run failed on this rank: others should neither use what it sent nor wait for more, if they can be told."""


class _Channel:
    """Messages from one rank, in the order in which they come; the receive of the next one is under way early."""

    def __init__(self, messages: list[Message]) -> None:
        self.expected = deque(messages)
        self.posted: Flight | None = None  # the receive of expected[0]
        self.arrived: dict[Message, tuple[Tensor, ...]] = {}


class ProcessGroupTransport:
    """The transport of a process group: gloo for tensors on the CPU, NCCL for tensors on a GPU.

    Args:
        group: the ranks of the pipeline, in order. All of them must make their transport at the same time.
        device: where the tensors of this rank live.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.device = device
        self._on_cpu = device.type == "cpu"
        self._header_group = self._up = self._down = group
        if not self._on_cpu:
            ranks = dist.get_process_group_ranks(group)
            make = dist.new_group
            self._header_group = make(ranks, backend="gloo", use_local_synchronization=True)
            self._up, self._down = (make(ranks, use_local_synchronization=True) for _ in range(2))
        self._channels: dict[int, _Channel] = {}
        # by destination: messages that may still be on their way
        self._outbox: dict[int, deque[tuple[Message, Flight]]] = {}
        self._num_sent: dict[int, int] = {}  # by destination: messages of this run
        self._done: deque[dist.Work] = deque(maxlen=NUM_KEPT_WORKS if self._on_cpu else 0)
        self._guess: dict[tuple[int, int], int] = {}  # (rank that receives, stage that made it) -> payload bytes
        self._sent_specs: dict[tuple[int, int], Specs] = {}  # (stage, microbatch) -> what its gradients look like

    def start(self, program: Program) -> None:
        self._channels = {source: _Channel(messages) for source, messages in program.incoming.items()}
        self._outbox.clear()
        self._num_sent.clear()
        self._sent_specs.clear()
        for source in self._channels:
            self._post(source)

    def send(self, message: Message, tensors: tuple[Tensor, ...]) -> None:
        peer = message.destination
        sent = self._send_activations if message.kind is Kind.F else self._send_gradients
        self._outbox.setdefault(peer, deque()).append((message, sent(message, tensors)))
        self._num_sent[peer] = self._num_sent.get(peer, 0) + 1
        if peer in self._channels:  # the gradients of what was just sent may be the next to come
            self._post(peer)

    def receive(self, message: Message, acknowledged: int) -> tuple[Tensor, ...]:
        peer = message.source
        channel = self._channels[peer]
        while message not in channel.arrived:
            self._post(peer)
            first = channel.expected.popleft()
            try:
                channel.arrived[first] = self._complete(channel, first)
            except RuntimeError as error:
                raise PeerError(peer, f"waited for {first} from", error) from error
            self._post(peer)
        self._release(peer, acknowledged)
        return channel.arrived.pop(message)

    def finish(self) -> None:
        for peer, num_sent in self._num_sent.items():
            self._release(peer, num_sent)

    def give_up(self) -> None:
        """Peers of a process group are told nothing: they wait until its timeout."""

    def _release(self, peer: int, acknowledged: int) -> None:
        """Wait for, and let go, the first ``acknowledged`` messages of this run to ``peer``."""
        outbox = self._outbox.get(peer, ())
        while outbox and self._num_sent[peer] - len(outbox) < acknowledged:
            message, flight = outbox.popleft()
            try:
                self._wait(flight)
            except RuntimeError as error:
                raise PeerError(peer, f"waited until {message} were taken by", error) from error

    def _post(self, source: int) -> None:
        """Start the next receive from ``source``, if none is under way and its size is known."""
        channel = self._channels[source]
        if channel.posted is not None or not channel.expected:
            return
        message = channel.expected[0]
        if message.kind is Kind.F:
            buffers = [torch.empty(HEADER_BYTES + self._guess.get((self.rank, message.stage), 0), dtype=torch.uint8)]
            group = self._header_group
        else:
            specs = self._sent_specs.pop((message.stage - 1, message.microbatch), None)
            if specs is None:
                return
            buffers = [torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs]
            group = self._direction(source, self.rank)
        channel.posted = [_receive(buffer, group, source) for buffer in buffers], buffers

    def _complete(self, channel: _Channel, message: Message) -> tuple[Tensor, ...]:
        """Wait for the receive under way, and for the second part of the message if there is one."""
        assert channel.posted is not None, f"{message} is waited for before its size is known"
        flight, buffers = channel.posted, channel.posted[1]
        channel.posted = None
        self._wait(flight)
        if message.kind is not Kind.F:
            return tuple(buffers)
        payload = buffers[0][HEADER_BYTES:]
        specs = decode_header(buffers[0][:HEADER_BYTES])
        total, guess = layout(specs)[1], payload.numel()
        if total > guess:
            first, payload = payload, torch.empty(total, dtype=torch.uint8, device=self.device)
            payload[:guess] = first
            group = self._direction(message.source, self.rank)
            rest = payload[guess:]
            self._wait(([_receive(rest, group, message.source)], [rest]))
        if self._on_cpu:
            self._guess[self.rank, message.stage] = total
        return unpack(payload, specs)

    def _send_activations(self, message: Message, tensors: tuple[Tensor, ...]) -> Flight:
        peer, specs = message.destination, tuple(Spec.of(tensor) for tensor in tensors)
        self._sent_specs[message.stage, message.microbatch] = tuple(spec for spec in specs if spec.requires_grad)
        total, guess = layout(specs)[1], self._guess.get((peer, message.stage), 0)
        if self._on_cpu:
            self._guess[peer, message.stage] = total
            first = rest = pack(tensors, specs, encode_header(specs), guess)
            if total > guess:
                first, rest = first[: HEADER_BYTES + guess], first[HEADER_BYTES + guess :]
        else:
            first, rest = encode_header(specs), pack(tensors, specs)
        works = [_send(first, self._header_group, peer)]
        if total > guess:
            works.append(_send(rest, self._direction(self.rank, peer), peer))
        return works, [first, rest]

    def _send_gradients(self, message: Message, tensors: tuple[Tensor, ...]) -> Flight:
        buffers = [tensor.contiguous() for tensor in tensors]
        group = self._direction(self.rank, message.destination)
        return [_send(buffer, group, message.destination) for buffer in buffers], buffers

    def _wait(self, flight: Flight) -> None:
        works, buffers = flight
        for work, buffer in zip(works, buffers, strict=False):  # a message that fits its guess has no second work
            work.wait()
            if buffer.nbytes <= KEPT_BYTES:
                self._done.append(work)

    def _direction(self, source: int, destination: int) -> dist.ProcessGroup:
        return self._up if source < destination else self._down


def _send(tensor: Tensor, group: dist.ProcessGroup, peer: int) -> dist.Work:
    # The group's own method: isend and irecv look up groups and ranks each time, as long as gloo takes for the message.
    return group.send([_real(tensor)], peer, 0)


def _receive(tensor: Tensor, group: dist.ProcessGroup, peer: int) -> dist.Work:
    return group.recv([_real(tensor)], peer, 0)


def _real(tensor: Tensor) -> Tensor:
    """Process groups move no complex numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
