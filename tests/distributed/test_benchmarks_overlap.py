"""The benchmark of hidden communication on sizes that take no time, and its network."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch

from benchmarks import expert_overlap
from r1mega.moe.collectives import InFlight
from r1mega.parallel_state import Layout, ParallelState

TINY = [
    "--latency_ms", "1", "--num_layers", "1", "--hidden_size", "16", "--length", "8", "--microbatches", "2",
    "--num_steps", "1", "--layer_tokens", "12", "--layer_hidden", "8", "--layer_steps", "1", "--chunks", "1", "3",
]  # fmt: skip


def measure(rank: int, world_size: int) -> dict:
    with mock.patch.object(sys, "argv", ["expert_overlap.py", *TINY]):
        arguments = expert_overlap.parse_arguments()
    return expert_overlap.measure(arguments, ParallelState(Layout(world_size, ep=world_size)))


def test_both_parts_are_measured_and_reported(pool):
    for found in pool.run(measure, 2):
        schedules, chunks = found["schedules"], found["chunks"]["chunks"]
        assert schedules["floor_seconds"] == 0.004 and schedules["hidden_at_most"] == 0.5
        # two microbatches of four messages; alone, each is waited for
        assert schedules["one by one"]["waiting_seconds"] >= 0.008
        assert chunks.keys() == {"1", "3"} and chunks["1"]["hidden"] == 0
        assert "hidden: " in expert_overlap.report(found) and "experts' forward" in expert_overlap.report(found)


@pytest.mark.parametrize("in_turn, arrivals", [(False, [102.0, 103.0, 109.0]), (True, [102.0, 104.0, 109.0])])
def test_a_message_arrives_when_its_time_has_passed_and_in_turn_after_the_one_before(monkeypatch, in_turn, arrivals):
    now = [100.0]

    class Clock:
        perf_counter = staticmethod(lambda: now[0])

        @staticmethod
        def sleep(seconds: float) -> None:
            now[0] += seconds

    monkeypatch.setattr(expert_overlap, "time", Clock)
    network = expert_overlap.Network(2.0, in_turn)
    try:
        sent = []
        for now[0] in (100.0, 101.0, 107.0):
            sent.append(InFlight(torch.zeros(1), None, lambda rows: (rows,)))
        now[0] = 100.5
        found = []
        for message in sent:
            message.wait()
            found.append(now[0])
        assert found == arrivals and network.waited == 109.0 - 100.5
    finally:
        network.remove()
    InFlight(torch.zeros(1), None, lambda rows: (rows,)).wait()
    assert now[0] == 109.0


def test_no_more_is_called_hidden_than_there_is_work_for():
    assert [expert_overlap.hidden_by_experts(chunks, 0.5) for chunks in (1, 2, 4)] == [0, 0.5, 0.75]
    assert expert_overlap.hidden_by_experts(4, 1.0) == (1 + 1.5) / 4
    assert expert_overlap.hidden_by_experts(100, 3.0) == 3 / 12
