"""Messages through shared memory, both ends of a link in one process: sending never waits."""

from __future__ import annotations

import gc
import os
import random
import socket
import threading
import time
from collections import deque

import pytest
import torch
from torch import Tensor

from r1mega.pipeline import shared_memory
from r1mega.pipeline.packing import Spec, decode_bytes, header_bytes
from r1mega.pipeline.shared_memory import NUM_RECORDS, SENT, SUPPORTED, TAKEN, Link

pytestmark = pytest.mark.skipif(not SUPPORTED, reason="shared memory is used on Linux on x86 alone")


def pair(timeout: float = 5.0) -> tuple[Link, Link]:
    a, b = (Link(connection, timeout) for connection in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    return a, b


def make(header: bytes) -> tuple[Tensor, ...]:
    return tuple(torch.empty(spec.shape, dtype=spec.dtype) for spec in decode_bytes(header))


def send(link: Link, name: int, *tensors: Tensor) -> None:
    link.send(name, header_bytes(tuple(map(Spec.of, tensors))), tensors)


def same(found: tuple[int, tuple[Tensor, ...]], name: int, *tensors: Tensor) -> None:
    assert found[0] == name and len(found[1]) == len(tensors)
    for actual, expected in zip(found[1], tensors, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))


def test_messages_come_in_order_with_their_bits_both_ways_at_once() -> None:
    a, b = pair()
    mixed = torch.randn(3, 5).bfloat16(), torch.empty(0, 7), torch.tensor([True, False]), torch.randn(2).double()
    send(a, 1, *mixed)
    send(b, 7, torch.tensor([torch.nan, -0.0]))
    send(a, 2)
    same(b.receive(make), 1, *mixed)
    same(b.receive(make), 2)
    same(a.receive(make), 7, torch.tensor([torch.nan, -0.0]))


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_comes_out_as_it_went_in_while_the_ring_turns_and_grows(seed, monkeypatch) -> None:
    monkeypatch.setattr(shared_memory, "SMALLEST_RING", 1 << 13)
    chance, (a, b) = random.Random(seed), pair()
    under_way: deque[tuple[int, Tensor]] = deque()
    largest = 1 << chance.choice([6, 10, 14])
    for number in range(1500):
        if under_way and chance.random() < 0.5:
            same(b.receive(make), *under_way.popleft())
        else:
            message = torch.randint(0, 256, (chance.randint(0, largest),), dtype=torch.uint8)
            under_way.append((number, message))
            send(a, number, message)
            message = None
    for expected in under_way:
        same(b.receive(make), *expected)


def test_a_ring_is_used_again_as_long_as_the_receiver_keeps_up() -> None:
    a, b = pair()
    for number in range(1, 50):
        for message in (number, -number):
            send(a, message, torch.full((1 << 16,), float(message)))
        same(b.receive(make), number, torch.full((1 << 16,), float(number)))
        same(b.receive(make), -number, torch.full((1 << 16,), -float(number)))
    assert a._out._number_of_ring == 1


def test_thousands_of_messages_that_nobody_has_taken_make_nobody_wait() -> None:
    a, b = pair()
    for number in range(NUM_RECORDS):
        send(a, number, torch.tensor(number))
    for number in range(NUM_RECORDS):
        same(b.receive(make), number, torch.tensor(number))
    send(a, 3000)
    same(b.receive(make), 3000)


@pytest.mark.parametrize("full", ["of messages", "of bytes"])
def test_a_sender_waits_for_room_and_the_ring_does_not_grow_without_end(full, monkeypatch) -> None:
    monkeypatch.setattr(shared_memory, "NUM_RECORDS", 8 if full == "of messages" else 4096)
    monkeypatch.setattr(shared_memory, "SMALLEST_RING", 1 << 12)
    monkeypatch.setattr(shared_memory, "LARGEST_RING", 1 << 15)
    a, b = pair()
    received = []

    def receive_slowly() -> None:
        for _ in range(100):
            time.sleep(0.001)
            received.append(b.receive(make))

    receiver = threading.Thread(target=receive_slowly)
    receiver.start()
    for number in range(100):
        send(a, number, torch.full((500,), float(number)))
        assert a._out._page.words[SENT] - a._out._page.words[TAKEN] <= (8 if full == "of messages" else 32)
    a.wait_until_taken()
    receiver.join()
    assert len(received) == 100 and a._out._ring.size <= 1 << 15
    for number, found in enumerate(received):
        same(found, number, torch.full((500,), float(number)))


def test_a_sender_that_finds_no_room_ends_after_its_timeout_or_when_the_other_is_gone(monkeypatch) -> None:
    monkeypatch.setattr(shared_memory, "NUM_RECORDS", 4)
    a, b = pair(timeout=0.2)
    for number in range(4):
        send(a, number)
    for wait in (lambda: send(a, 4), a.wait_until_taken):
        with pytest.raises(TimeoutError, match="timed out after 0.2 s"):
            wait()
    a, b = pair(timeout=30)
    send(a, 1)
    del b
    with pytest.raises(ConnectionError):
        a.wait_until_taken()


def test_after_an_end_nothing_that_was_sent_is_received() -> None:
    a, b = pair()
    send(a, 1, torch.ones(3))
    send(a, 2, torch.ones(3))
    same(b.receive(make), 1, torch.ones(3))
    a.end()
    with pytest.raises(ConnectionError, match="its run failed"):
        b.receive(make)
    with pytest.raises(ConnectionError):
        send(b, 1)


def test_a_run_that_failed_before_the_other_side_made_its_link_is_told_as_any_other() -> None:
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    Link(first, 5.0).end()
    late = Link(second, 5.0)
    with pytest.raises(ConnectionError, match="its run failed"):
        late.receive(make)
    with pytest.raises(ConnectionError):
        send(late, 1, torch.ones(2))


def test_memory_that_cannot_be_opened_here_is_named(monkeypatch) -> None:
    for first in (True, False):
        a, b = pair()
        send(a, 1)
        if not first:
            send(a, 2, torch.ones(1 << 20))  # in a ring of its own
            b.receive(make)
        without = lambda *_: (b"\0", [], 0, None)  # noqa: E731 - what the system gives where descriptors have run out
        monkeypatch.setattr(shared_memory.socket, "recv_fds", without)
        with pytest.raises(ConnectionError, match="too many open files"):
            b.receive(make)
        monkeypatch.undo()


def test_what_a_dead_process_has_sent_is_received_and_then_its_end() -> None:
    a, b = pair()
    send(a, 1, torch.ones(3))
    send(a, 2, torch.ones(1 << 20))
    del a
    same(b.receive(make), 1, torch.ones(3))
    same(b.receive(make), 2, torch.ones(1 << 20))
    with pytest.raises(ConnectionError, match="it closed the connection, or died"):
        b.receive(make)
    with pytest.raises(ConnectionError):
        for number in range(3):
            send(b, number)


@pytest.mark.parametrize("waits", [False, True])
def test_a_receiver_that_takes_the_last_message_and_goes_before_it_is_called_is_no_error(waits, monkeypatch) -> None:
    monkeypatch.setattr(shared_memory, "SECONDS_BETWEEN_CALLS", 0.0)
    a, b = pair()
    call, receivers = Link._call, [b]
    del b

    def call_late(link: Link) -> None:
        same(receivers.pop().receive(make), 1, torch.ones(3))
        call(link)

    if waits:
        send(a, 1, torch.ones(3))
    monkeypatch.setattr(Link, "_call", call_late)
    a.wait_until_taken() if waits else send(a, 1, torch.ones(3))
    monkeypatch.undo()
    assert not receivers
    with pytest.raises(ConnectionError):
        send(a, 2)


def test_silence_ends_after_the_timeout() -> None:
    a, b = pair(timeout=0.2)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="timed out after 0.2 s"):
        b.receive(make)
    assert time.monotonic() - start > 0.1
    send(a, 1)
    same(b.receive(make), 1)


def test_links_leave_no_descriptors_and_no_memory_files() -> None:
    gc.collect()  # what other tests have left, which might go while this one counts
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        a, b = pair()
        send(a, 1, torch.ones(1 << 20))
        send(b, 1, torch.ones(5))
        a.receive(make), b.receive(make)
        del a, b
    assert len(os.listdir("/proc/self/fd")) == before
