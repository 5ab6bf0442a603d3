"""The figures of simulated schedules: as text, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from r1mega.pipeline.simulator import Simulation
from r1mega.pipeline.timeline.terminal import Terminal, bars, timeline


def figures(name: str, simulation: Simulation) -> dict[str, Any]:
    """What is known of a schedule; lists are by rank, ``stage_to_rank`` by stage."""
    table = simulation.table
    return {
        "schedule": name,
        "ranks": table.num_ranks,
        "microbatches": table.num_microbatches,
        "stages": table.num_stages,
        "copies": table.num_copies,
        "stage_to_rank": table.stage_to_rank,
        "bubble_rate": simulation.bubble_rate,
        "bubble_rate_makespan": simulation.bubble_rate_makespan,
        "makespan": simulation.makespan,
        "longest_rank": simulation.longest_rank,
        "busy": simulation.busy,
        "peak_activations": simulation.peak_activations,
        "weights": simulation.weights,
    }


def describe(name: str, simulation: Simulation, terminal: Terminal) -> str:
    """One schedule: its figures and its timeline."""
    table = simulation.table
    copies = f" in {table.num_copies} copies of the model" if table.num_copies > 1 else ""
    peak, weights = max(simulation.peak_activations), max(simulation.weights)
    rank = simulation.peak_activations.index(peak)
    rows = [
        ("bubble rate by the longest rank", f"{simulation.bubble_rate:.2%}", "of its time, first start to last end"),
        ("bubble rate by the whole pipeline", f"{simulation.bubble_rate_makespan:.2%}", "of the makespan"),
        ("makespan", f"{simulation.makespan:,.6g}", "first start to last end of all ranks"),
        ("peak activations", f"{peak:.4g}", f"microbatches of one rank's share of the model, on rank {rank}"),
        ("weights", f"{weights:.4g}", "of one rank's share of the model"),
    ]
    size = f"{_count(table.num_ranks, 'rank')}, {_count(table.num_stages, 'stage')}{copies}"
    return "\n".join([
        f"{name}: {size}, {_count(table.num_microbatches, 'microbatch')}",
        "",
        *(f"{label:34}{value:>10}   {meaning}" for label, value, meaning in rows),
        "",
        timeline(simulation, terminal),
    ])  # fmt: skip


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{plural if number != 1 else ''}"


def compare(
    simulations: Mapping[str, Simulation],
    refused: Mapping[str, str],
    terminal: Terminal,
    memory_limit: float | None = None,
) -> str:
    """A line for each schedule, with a bar; for those that cannot run the reason.

    With ``memory_limit`` a column says which of them ``auto`` is compared with: those that are within it and have one
    copy of the weights.
    """
    width = max(map(len, [*simulations, *refused, "schedule"])) + 1
    verdicts = {} if memory_limit is None else {name: verdict(s, memory_limit) for name, s in simulations.items()}
    verdicts = {name: found or "within" for name, found in verdicts.items()}
    room = max(map(len, [*verdicts.values(), "limit"])) + 2 if verdicts else 0
    title = f"{'schedule':{width}}{'bubble':>8}{'of step':>9}{'makespan':>12}{'peak':>8}{'weights':>9}"
    title += f"{'limit' if verdicts else '':>{room}}  "
    drawn = bars(simulations, max(10, terminal.width - len(title) - 1), terminal.unicode)
    lines = [title + "the step: work and bubble"]
    for name, s in simulations.items():
        rates = f"{s.bubble_rate:8.2%}{s.bubble_rate_makespan:9.2%}{s.makespan:12,.6g}"
        held = f"{max(s.peak_activations):8.4g}{max(s.weights):9.4g}{verdicts.get(name, ''):>{room}}"
        lines.append(f"{name:{width}}{rates}{held}  {drawn[name]}")
    lines += [f"{name:{width}}cannot run: {reason}" for name, reason in refused.items()]
    return "\n".join([
        *lines,
        "",
        "bubble: idle share by the longest rank (of its time, first start to last end); of step: of the makespan",
        "peak: most activations of any rank, in microbatches of one rank's share of the model; weights: of that share",
    ])  # fmt: skip


def verdict(simulation: Simulation, memory_limit: float) -> str:
    """Why ``auto`` is not compared with a schedule: "over", "2 copies", both or neither."""
    from r1mega.pipeline.auto import peak_memory

    table = simulation.table
    over = ["over"] if max(peak_memory(table)) > memory_limit + 1e-9 else []
    return ", ".join([*over, *([f"{table.num_copies} copies"] if table.num_copies > 1 else [])])


def searched(memory_limit: float, peak_memory: list[float], overlap: float) -> str:
    """What a search within ``memory_limit`` was compared with, and what its limit counts."""
    lines = [
        "auto is compared with the schedules that hold one copy of the weights: DualPipe, with two, is not among them",
        f"limit: {memory_limit:g}, and {max(peak_memory):g} are needed, counted as in the Zero Bubble paper: a forward "
        "adds 1, an input gradient",
        "and a weight gradient give back 0.5 each; peak activations count until the weight gradient",
    ]
    if overlap != 1:
        lines.append(
            "overlap: no search makes any; of the schedules that auto is compared with dualpipev alone has some"
        )
    return "\n".join(lines)
