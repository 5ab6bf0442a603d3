"""Times a row of ``gpu_rows.py`` on a GPU and prints it beside its target and its peer."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import torch

from benchmarks.timing import Work, machine_rates, seconds

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
ROUNDS, CALLS = 10, 20


@dataclass
class Row:
    """What is timed.

    Args:
        name: of the row.
        works: calls that take turns.
        num_bytes: the fewest bytes that one call can move.
        flops: multiply-adds of one call, times two; the fraction is of these where they are given.
        at_most: the target in microseconds.
        at_least: the target as a fraction.
        peer: the same in PyTorch's operations.
    """

    name: str
    works: list[Work]
    num_bytes: int = 0
    flops: int = 0
    at_most: float | None = None
    at_least: float | None = None
    peer: list[Work] = field(default_factory=list)


@dataclass
class Rates:
    """Bytes a second of a copy, operations a second of a product; measured here."""

    copy: float
    product: float

    @classmethod
    def measure(cls) -> Rates:
        return cls(*machine_rates(DEVICE, BF16))


def timed(run: Work, calls: int) -> list[float]:
    """Seconds of one call in each round, by CUDA events around ``run``, which makes ``calls`` calls."""
    found = seconds({"run": run}, ROUNDS, 1, DEVICE)["run"]
    return [of_round / calls for of_round in found]


def in_turn(works: list[Work]) -> tuple[Work, int]:
    """All of ``works`` one after the other, often enough, and how many calls that is. Results are let go at once."""
    times = max(1, -(-CALLS // len(works)))

    def run() -> None:
        for _ in range(times):
            for work in works:
                work()

    return run, times * len(works)


def graph_seconds(works: list[Work]) -> list[float] | None:
    """In a CUDA graph, without gaps between launches; None where none can be made of these."""
    run, calls = in_turn(works)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except RuntimeError as error:
        print(f"  no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return None
    return timed(graph.replay, calls)


def times_of(works: list[Work], with_graph: bool) -> tuple[list[float], list[float]]:
    """Seconds of one call in each round: on the GPU as far as that can be told, and with launches from Python."""
    eager = timed(*in_turn(works))  # first: it compiles what is compiled at first use
    return (graph_seconds(works) if with_graph else None) or eager, eager


def measure(row: Row, rates: Rates, with_graph: bool) -> dict:
    """Times, fraction and target of a row."""
    found, eager = times_of(row.works, with_graph)
    median = statistics.median(found)
    of, amount, rate = ("product", row.flops, rates.product) if row.flops else ("copy", row.num_bytes, rates.copy)
    fraction = amount / median / rate if amount else None
    met = None
    if row.at_most is not None:
        met = median * 1e6 <= row.at_most
    elif row.at_least is not None:
        met = fraction is not None and fraction >= row.at_least
    return {
        "row": row.name, "seconds": found, "eager_seconds": eager, "floor_bytes": row.num_bytes, "flops": row.flops,
        "fraction": fraction, "of": of if amount else None, "at_most_us": row.at_most, "at_least": row.at_least,
        "met": met, "pytorch_seconds": times_of(row.peer, with_graph)[0] if row.peer else None,
    }  # fmt: skip


def head() -> str:
    return f"{'row':28}{'us':>10}{'eager us':>10}{'fraction':>10}  {'of':9}{'target':>10}{'PyTorch us':>12}"


def line_of(result: dict) -> str:
    """A row of the table."""
    us = lambda values: f"{statistics.median(values) * 1e6:.2f}" if values else "-"  # noqa: E731
    fraction = "-" if result["fraction"] is None else f"{result['fraction']:.2f}"
    target = "-"
    if result["at_most_us"] is not None:
        target = f"<= {result['at_most_us']:g} us"
    elif result["at_least"] is not None:
        target = f">= {result['at_least']:g}"
    told = f"{result['row']:28}{us(result['seconds']):>10}{us(result['eager_seconds']):>10}{fraction:>10}  "
    return (
        told
        + f"{result['of'] or '-':9}{target:>10}{us(result['pytorch_seconds']):>12}"
        + ("" if result["met"] is None else "  met" if result["met"] else "  MISSED")
    )
