"""The dispatcher's benchmark on sizes that take no time."""

from __future__ import annotations

import argparse

from benchmarks import dispatcher
from r1mega.parallel_state import Layout, ParallelState

SETTINGS = argparse.Namespace(
    ranks=2, tokens=12, hidden=128, experts=4, top_k=2, dtype="float32", wires=dispatcher.WIRES, chunks=[1, 3],
    num_steps=2,
)  # fmt: skip


def measure(rank: int, world_size: int) -> list[dict]:
    return dispatcher.measure(SETTINGS, ParallelState(Layout(world_size, ep=world_size)))


def test_narrower_rows_send_fewer_bytes_and_chunks_more_messages(pool):
    lines, others = pool.run(measure, 2)
    assert lines == others
    assert [(line["wire"], line["chunks"]) for line in lines] == [(w, c) for w in dispatcher.WIRES for c in (1, 3)]
    assert [line["messages"] for line in lines] == [1 + 4 * line["chunks"] for line in lines]
    sent = {(line["wire"], line["chunks"]): line["bytes_sent"] for line in lines}
    assert sent["model", 1] > 1.7 * sent["bfloat16", 1] > 2 * sent["float8", 1]
    assert 0 < sent["model", 3] - sent["model", 1] == 2 * 8 * 3  # the counts of two more chunks
    assert all(line["step_seconds"] > 0 and line["cpu_seconds"] > 0 for line in lines)
    assert dispatcher.table(lines, 12).count("\n") == 6
