"""Writes simulated schedules in Chrome's trace format, which https://ui.perfetto.dev opens.

A schedule is a process, a rank one of its threads, and an action a slice. Arrows lead from an action to the one on
another rank that takes what it made; a counter for each rank shows the activations that it holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from r1mega.pipeline.actions import PER_STEP, Kind
from r1mega.pipeline.simulator import Simulation
from r1mega.pipeline.transfers import Message, programs

MICROSECONDS = 1000.0  # a unit of the costs is shown as a millisecond


def trace(simulations: Mapping[str, Simulation]) -> str:
    """The JSON text for schedules by name; a unit of their costs is shown as a millisecond."""
    events: list[dict] = []
    for process, (name, simulation) in enumerate(simulations.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        events += _slices(process, simulation)
        events += _arrows(process, simulation)
        events += _counters(process, simulation)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})


def _slices(process: int, simulation: Simulation) -> Iterator[dict]:
    for rank, row in enumerate(simulation.spans):
        place = {"pid": process, "tid": rank}
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": rank}}
        for span in row:
            arguments = {
                "stage": [action.stage for action in span.actions],
                "microbatch": [action.microbatch for action in span.actions if action.kind not in PER_STEP],
            }
            kind = "&".join(action.kind for action in span.actions)
            time = {"ts": span.start * MICROSECONDS, "dur": (span.end - span.start) * MICROSECONDS}
            yield {"ph": "X", "name": str(span.cell), "cat": kind, **place, **time, "args": arguments}


def _arrows(process: int, simulation: Simulation) -> Iterator[dict]:
    number: dict[Message, int] = {}
    for program, row in zip(programs(simulation.table), simulation.spans, strict=True):
        for together, (_, start, end) in zip(program.steps, row, strict=True):
            within = end - (end - start) / 100  # an arrow that began at the very end would belong to no slice
            for step in together:
                for message, phase, time in ((step.gives, "s", within), (step.takes, "f", start)):
                    if message is not None and message.source != message.destination:
                        yield {
                            "ph": phase,
                            "bp": "e",
                            "name": "activations" if message.kind is Kind.F else "gradients",
                            "cat": "message",
                            "id": f"{process}.{number.setdefault(message, len(number))}",
                            "pid": process,
                            "tid": program.rank,
                            "ts": time * MICROSECONDS,
                        }


def _counters(process: int, simulation: Simulation) -> Iterator[dict]:
    for rank in range(len(simulation.spans)):
        name = f"activations of rank {rank}"
        for time, held in [(0.0, 0.0), *simulation.activations(rank)]:
            yield {"ph": "C", "name": name, "pid": process, "ts": time * MICROSECONDS, "args": {"microbatches": held}}
