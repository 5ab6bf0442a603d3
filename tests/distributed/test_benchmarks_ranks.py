"""Benchmarks of the dispatcher and of imbalance over two ranks, on sizes that take no time."""

from __future__ import annotations

import argparse

from benchmarks import dispatcher, imbalance
from r1mega.parallel_state import Layout, ParallelState

DISPATCHER = argparse.Namespace(
    ranks=2, tokens=12, hidden=128, experts=4, top_k=2, dtype="float32", wires=dispatcher.WIRES, chunks=[1, 3],
    num_steps=2,
)  # fmt: skip


IMBALANCE = argparse.Namespace(
    ranks=2, tokens=64, hidden=8, experts=8, top_k=2, width=8, skew=[0.0, 1.5], redundant=2, num_steps=2
)  # fmt: skip


def measure(rank: int, world_size: int, benchmark: str) -> list[dict]:
    state = ParallelState(Layout(world_size, ep=world_size))
    if benchmark == "dispatcher":
        return dispatcher.measure(DISPATCHER, state)
    return imbalance.measure(IMBALANCE, state)


def test_narrower_rows_send_fewer_bytes_and_chunks_more_messages(pool):
    lines, others = pool.run(measure, 2, "dispatcher")
    assert lines == others
    assert [(line["wire"], line["chunks"]) for line in lines] == [(w, c) for w in dispatcher.WIRES for c in (1, 3)]
    assert [line["messages"] for line in lines] == [1 + 4 * line["chunks"] for line in lines]
    sent = {(line["wire"], line["chunks"]): line["bytes_sent"] for line in lines}
    assert sent["model", 1] > 1.7 * sent["bfloat16", 1] > 2 * sent["float8", 1]
    assert 0 < sent["model", 3] - sent["model", 1] == 2 * 8 * 3  # the counts of two more chunks
    assert all(line["step_seconds"] > 0 and line["cpu_seconds"] > 0 for line in lines)
    assert dispatcher.table(lines, 12).count("\n") == 6


def test_imbalance_has_a_step_and_the_ranks_of_each_skew_and_placement(pool):
    lines, others = pool.run(measure, 2, "imbalance")
    assert lines == others and [line["skew"] for line in lines] == IMBALANCE.skew
    for line in lines:
        assert line["placements"].keys() == set(imbalance.PLACEMENTS)
        for cell in line["placements"].values():
            assert len(cell["cpu_seconds_of_ranks"]) == 2 and min(cell["cpu_seconds_of_ranks"]) > 0
            assert cell["step_seconds"] > 0 and cell["ranks_max_over_mean"] >= 1
    skewed = lines[1]["placements"]
    assert skewed["in order"]["ranks_max_over_mean"] > 1.2 > skewed["placed with copies"]["ranks_max_over_mean"]
    assert imbalance.table(lines).count("\n") == 3
