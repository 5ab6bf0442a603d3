"""What runs under what while messages are under way: ``moe.chunks``, and the exchange of counts.

Two real ranks; the events of one are written down, and its messages take a known time of a clock that only they and the
experts move, so that what is hidden can be said exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from r1mega.config import MoEConfig
from r1mega.moe import exchanges
from r1mega.moe.collectives import Counts
from r1mega.moe.dispatcher import AllToAllDispatcher, routing_of
from r1mega.moe.exchanges import ToExperts, ToTokens
from r1mega.moe.layer import MoELayer
from r1mega.moe.wire import RowFormat
from r1mega.parallel_state import Layout, ParallelState

EXPERTS, HIDDEN, TOKENS = 8, 6, 12
MESSAGE_TIME, EXPERTS_TIME = 6, 12  # of all tokens of a layer; a chunk has its part


class Watch:
    """Events of this rank in order, and a clock; one message is on the wire at a time."""

    def __init__(self, chunks: int) -> None:
        self.events: list[str] = []
        self.chunks, self.now, self.wire_is_free_at, self.waited = chunks, 0.0, 0.0, 0.0
        self._plans: list[object] = []

    def number(self, plan: object) -> int:
        if plan not in self._plans:
            self._plans.append(plan)
        return self._plans.index(plan)

    def start(self, name: str, start: Callable[..., Any], exchange: ToExperts | ToTokens, *tensors: Any) -> Delayed:
        number = self.number(exchange.plan)
        self.events.append(f"{name} {number} starts")
        pending = start(exchange, *tensors)
        self.wire_is_free_at = max(self.now, self.wire_is_free_at) + MESSAGE_TIME / self.chunks
        return Delayed(self, f"{name} {number}", pending, self.wire_is_free_at)

    def compute(self, name: str) -> None:
        self.events.append(name)
        self.now += EXPERTS_TIME / self.chunks


class Delayed:
    """A message that is there at a certain time."""

    def __init__(self, watch: Watch, name: str, pending: Any, time: float) -> None:
        self.watch, self.name, self.pending, self.time = watch, name, pending, time

    def wait(self) -> Any:
        watch = self.watch
        watch.events.append(f"{self.name} is there")
        watch.waited += max(0.0, self.time - watch.now)
        watch.now = max(watch.now, self.time)
        return self.pending.wait()


def watch_layer(rank: int, world_size: int, chunks: int) -> tuple[list[str], list[str], float]:
    """Events of a layer's forward and of its backward, and the time that the forward has waited."""
    config = MoEConfig(EXPERTS, 3, 4, num_shared_experts=1, chunks=chunks)
    layer = MoELayer(HIDDEN, config, ParallelState(Layout(world_size, ep=world_size)))
    watch, run_experts, calls = Watch(chunks), layer._run_experts, iter(range(chunks))

    def watched_experts(d: Any, rows: Any, weights: Any) -> Any:
        number = next(calls)
        watch.compute(f"experts {number}")
        rows.register_hook(lambda _: watch.compute(f"experts {number}"))  # when their backward has made it
        return run_experts(d, rows, weights)

    layer._run_experts = watched_experts
    assert layer.shared_experts is not None
    layer.shared_experts.register_forward_hook(lambda *_: watch.events.append("shared expert"))
    layer.shared_experts.register_full_backward_hook(lambda *_: watch.events.append("shared expert"))
    with pytest.MonkeyPatch.context() as patch:
        for exchange, name in ((ToExperts, "dispatch"), (ToTokens, "combine")):
            for method in ("start", "start_backward"):
                start = partial(watch.start, name, getattr(exchange, method))
                patch.setattr(exchange, method, lambda self, *tensors, start=start: start(self, *tensors))
        output, _ = layer(torch.randn(TOKENS, HIDDEN, requires_grad=True), TOKENS, 1)
        forward, watch.events, waited = watch.events, [], watch.waited
        output.sum().backward()
    return forward, watch.events, waited


def test_all_chunks_set_out_before_the_first_experts_and_each_comes_back_under_the_next(pool):
    expected = [*(f"dispatch {c} starts" for c in range(3)), "shared expert"]
    for c in range(3):
        expected += [f"dispatch {c} is there", f"experts {c}", f"combine {c} starts"]
    expected += [f"combine {c} is there" for c in range(3)]
    for forward, _, _ in pool.run(watch_layer, 2, 3):
        assert forward == expected


def test_the_backward_does_the_same_from_the_other_end(pool):
    expected = [f"combine {c} starts" for c in (2, 1, 0)]
    for c in (2, 1, 0):
        expected += [f"combine {c} is there", f"experts {c}", f"dispatch {c} starts"]
    expected += ["shared expert", *(f"dispatch {c} is there" for c in (2, 1, 0))]
    for _, backward, _ in pool.run(watch_layer, 2, 3):
        assert backward == expected


@pytest.mark.parametrize("chunks, waited", [(1, 12.0), (2, 6.0), (3, 4.0)])
def test_chunks_hide_the_messages_behind_which_experts_run(pool, chunks, waited):
    """Where experts take as long as both messages: all but the first chunk's way there and the last one's back."""
    assert [found for *_, found in pool.run(watch_layer, 2, chunks)] == [waited] * 2


def watch_packing(rank: int, world_size: int) -> list[str]:
    """What happens between the start of the counts' exchange and that of the first message."""
    dispatcher = AllToAllDispatcher(EXPERTS, ParallelState(Layout(world_size, ep=world_size)).group("ep"))
    weights, experts = torch.rand(TOKENS, EXPERTS).topk(3)
    events: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (Counts, "__init__"), (RowFormat, "pack"), (exchanges, "copy_rows"), (Counts, "of_chunk"),
            (exchanges, "start_exchange"),
        ):  # fmt: skip
            work = getattr(owner, name)
            patch.setattr(owner, name, lambda *args, n=name, work=work, **kw: (events.append(n), work(*args, **kw))[1])
        d = dispatcher.prepare(torch.randn(TOKENS, HIDDEN), routing_of(experts, weights, EXPERTS))
        assert d.to_experts is not None
        d.to_experts.start(*d.inputs).wait()
    return events


def test_the_message_is_packed_and_copied_while_the_counts_travel(pool):
    for events in pool.run(watch_packing, 2):
        assert events == ["__init__", "pack", "copy_rows", "of_chunk", "start_exchange"]
