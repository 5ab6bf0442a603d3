"""``auto``: the best table for given costs and memory that the searches of this package find together."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from r1mega.pipeline.actions import Kind, Overlap, Table
from r1mega.pipeline.auto import exact
from r1mega.pipeline.auto.bounds import lower_bound
from r1mega.pipeline.auto.improve import improve
from r1mega.pipeline.auto.list_scheduling import list_rows
from r1mega.pipeline.auto.problem import Objective, Problem, Rows, peak_memory
from r1mega.pipeline.auto.zb_greedy import greedy_rows
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.schedules import SCHEDULES, make_table
from r1mega.pipeline.schedules.common import require_positive
from r1mega.pipeline.simulator import Simulation, simulate

TOLERANCE = 1e-6  # a table is proved optimal where its objective is no more than this share above the bound
MOST_ACTIONS = 160  # F, I and W in all ranks together up to which the exact solver is asked
SOLVER_TIME = 2.0  # deterministic time of the exact solver; one unit is some seconds at worst
ACTIONS_TO_TIME = 1_000_000  # by the local improvement, for each placement
STARTS = 3  # tables from which the local improvement begins


@dataclass(frozen=True)
class AutoResult:
    """A table and how good it is. Times are in the unit of the costs.

    Args:
        table: the best table found.
        simulation: its times.
        objective: what was to be small, ``makespan`` or ``longest_rank``.
        value: the objective of ``table``.
        lower_bound: what no table of these chunks can go below within the memory limit (see ``bounds``).
        found_by: the name of the schedule, or of the search, that the table comes from.
        peak_memory: for each rank the most memory, in the unit of the limit.
        exact_solver: whether the exact solver was asked, and if not, why.
    """

    table: Table
    simulation: Simulation
    objective: Objective
    value: float
    lower_bound: float
    found_by: str
    peak_memory: list[float]
    exact_solver: str

    @property
    def makespan(self) -> float:
        """From the start of the step to the end of the last action of any rank."""
        return self.simulation.makespan

    @property
    def bubble_rate(self) -> float:
        """The share of idle time by the longest rank (:attr:`Simulation.bubble_rate`)."""
        return self.simulation.bubble_rate

    @property
    def gap(self) -> float:
        """How much longer than the lower bound it takes, as a share of the bound; the optimum lies in between."""
        return max(0.0, self.value / self.lower_bound - 1) if self.lower_bound else 0.0

    @property
    def proved_optimal(self) -> bool:
        """Whether no table of these chunks can be better."""
        return self.gap <= TOLERANCE

    def __str__(self) -> str:
        verdict = "proved optimal" if self.proved_optimal else f"at most {self.gap:.2%} above the optimum"
        return (
            f"auto: {self.objective} {self.value:.6g}, {verdict} (lower bound {self.lower_bound:.6g}); "
            f"found by {self.found_by}; exact solver: {self.exact_solver}"
        )


def best_table(
    num_ranks: int,
    num_microbatches: int,
    costs: Costs,
    memory_limit: float | Sequence[float],
    chunks: int | Sequence[int] | None = None,
    objective: Objective = "makespan",
    effort: float = 1.0,
) -> AutoResult:
    """The best table that is found for measured costs and a memory limit; never worse than any named schedule.

    Named schedules, the Zero Bubble paper's greedy search and list scheduling give the first tables; local improvement
    makes the best of them better; on small ones CP-SAT goes on to the optimum, or at least raises the lower bound.
    The same arguments give the same table. Named schedules with two copies of the weights (DualPipe) are left out.

    Args:
        num_ranks: ranks of the pipeline.
        num_microbatches: microbatches of a step.
        costs: times of the stages.
        memory_limit: the most memory of a rank, or of each one, in microbatches of one rank's layers: an F adds 1 over
            the number of chunks, an I and a W give back half of that each, a B all of it.
        chunks: stages that a rank holds, or several numbers to choose from. By default as many as ``costs`` are for; 1
            where they are the same for all stages. Costs that are the same for all stages are those of a stage
            where a rank holds the first number. For other numbers stages are joined or cut in equal parts
            (:meth:`Costs.recut`).
        objective: ``makespan``, since a training step ends when its slowest rank does: the gradient norm needs all of
            them. ``longest_rank`` is the Zero Bubble paper's, where ranks go on to the next step without waiting.
        effort: of the local improvement and the exact solver; 1.0 is from less than a second to about twenty.

    Raises:
        ValueError: a number does not fit; names it and says what would.
    """
    require_positive(num_ranks, num_microbatches)
    limits = _limits(memory_limit, num_ranks)
    choices = _choices(chunks, costs, num_ranks)
    by_stage = _by_stage(costs, num_ranks * choices[0])
    results = []
    for number in choices:
        named = list(_named(num_ranks, num_microbatches, number))
        recut = by_stage.recut(num_ranks * number)
        for placement in dict.fromkeys(tuple(table.stage_to_rank) for _, table in named):
            fitting = [(name, table) for name, table in named if tuple(table.stage_to_rank) == placement]
            problem = Problem.of(placement, num_microbatches, recut, limits, objective)
            results.append(_solve(problem, recut, limits, fitting, effort))
    best = min(results, key=lambda result: _order(result.simulation, objective))
    return replace(best, lower_bound=min(result.lower_bound for result in results))


class _Candidate(NamedTuple):
    name: str
    table: Table
    simulation: Simulation
    rows: Rows | None  # None where the table is not made of F, I and W in turn


def _solve(
    problem: Problem, costs: Costs, limits: list[float], named: list[tuple[str, Table]], effort: float
) -> AutoResult:
    """The best table for one placement of the stages."""
    objective = problem.objective
    candidates = [
        _Candidate(name, table, simulate(table, costs), None)
        for name, table in named
        if all(peak <= limit + 1e-9 for peak, limit in zip(peak_memory(table), limits, strict=True))
    ]
    bound = lower_bound(problem)
    found: dict[tuple[float, float], tuple[str, Rows]] = {}
    for name, rows in _first_rows(problem, named):
        timing = problem.time(rows)
        if timing is not None and all(problem.fits(rank, row) for rank, row in enumerate(rows)):
            found.setdefault(problem.score(timing), (name, rows))
    starts = [found[score] for score in sorted(found)[:STARTS]]
    improved = []
    for name, rows in starts:
        better = improve(problem, rows, int(effort * ACTIONS_TO_TIME) // len(starts), bound * (1 + TOLERANCE))
        improved.append((f"local improvement of {name}", better))
    candidates += [_candidate(problem, costs, name, rows) for name, rows in starts + improved]
    best = min(candidates, key=lambda candidate: _order(candidate.simulation, objective))
    best, bound, solver = _exactly(problem, costs, candidates, best, bound, effort)
    if costs.overlap < 1 and any(isinstance(cell, Overlap) for _, table in named for row in table.rows for cell in row):
        bound = lower_bound(replace(problem, durations=tuple(costs.overlap * time for time in problem.durations)))
    value = _value(best.simulation, objective)
    assert bound <= value * (1 + TOLERANCE), "a bound that a table goes below is none"
    return AutoResult(
        best.table, best.simulation, objective, value, bound, best.name,
        peak_memory(best.table), solver,
    )  # fmt: skip


def _first_rows(problem: Problem, named: list[tuple[str, Table]]) -> Iterator[tuple[str, Rows]]:
    """Where the search begins; some may need too much memory."""
    for name, table in named:
        yield f"{name} with split backwards", problem.rows(table)
    if problem.chunks == 1:
        yield from (("greedy search", rows) for rows in greedy_rows(problem))
    yield from (("list scheduling", rows) for rows in list_rows(problem))


def _exactly(
    problem: Problem, costs: Costs, candidates: list[_Candidate], best: _Candidate, bound: float, effort: float
) -> tuple[_Candidate, float, str]:
    """The best candidate, the bound, and what was done, after the exact solver if it is needed and can help."""
    size = 3 * problem.num_stages * problem.num_microbatches
    if _value(best.simulation, problem.objective) <= bound * (1 + TOLERANCE):
        return best, bound, "not needed"
    if size > MOST_ACTIONS:
        return best, bound, f"not asked, since {size} actions are more than {MOST_ACTIONS}"
    if importlib.util.find_spec("ortools") is None:
        return best, bound, "OR-tools is not installed (pip install ortools)"
    hint = min(
        (candidate for candidate in candidates if candidate.rows),
        key=lambda candidate: _order(candidate.simulation, problem.objective),
    )
    assert hint.rows is not None
    proof = exact.solve(problem, hint.rows, effort * SOLVER_TIME)
    if proof.rows is not None:
        solved = _candidate(problem, costs, "exact solver", proof.rows)
        best = min(best, solved, key=lambda candidate: _order(candidate.simulation, problem.objective))
    return best, max(bound, proof.bound), "CP-SAT"


def _candidate(problem: Problem, costs: Costs, name: str, rows: Rows) -> _Candidate:
    table = problem.table(rows)
    return _Candidate(name, table, simulate(table, costs), rows)


def _value(simulation: Simulation, objective: Objective) -> float:
    return simulation.makespan if objective == "makespan" else simulation.longest_rank


def _order(simulation: Simulation, objective: Objective) -> tuple[float, float]:
    """What to sort by: the objective, then the other one. Rounded, so that noise does not decide."""
    values = (simulation.makespan, simulation.longest_rank)
    first, second = (float(f"{value:.10g}") for value in (values if objective == "makespan" else values[::-1]))
    return first, second


def _named(num_ranks: int, num_microbatches: int, chunks: int) -> Iterator[tuple[str, Table]]:
    """The named schedules with one copy of the weights that can run so."""
    for name, schedule in SCHEDULES.items():
        if schedule.chunks in (None, chunks):
            try:
                table = make_table(name, num_ranks, num_microbatches, chunks if schedule.chunks is None else None)
            except ValueError:  # cannot run with these numbers
                continue
            if table.num_copies == 1 and table.num_stages == num_ranks * chunks:
                yield name, table


def _limits(limit: float | Sequence[float], num_ranks: int) -> list[float]:
    limits = [limit] * num_ranks if isinstance(limit, (int, float)) else list(limit)
    if len(limits) != num_ranks:
        raise ValueError(f"memory_limit: {len(limits)} numbers for {num_ranks} ranks; give one a rank, or one for all")
    for each in limits:
        if not each >= 1:
            raise ValueError(f"memory_limit={each}: must be 1 or more, the activations of one microbatch")
    return limits


def _choices(chunks: int | Sequence[int] | None, costs: Costs, num_ranks: int) -> list[int]:
    if chunks is None:
        given = costs.num_stages or num_ranks
        if given % num_ranks:
            raise ValueError(f"costs are for {given} stages, which {num_ranks} ranks cannot hold equally many of")
        return [given // num_ranks]
    choices = [chunks] if isinstance(chunks, int) else list(chunks)
    if not choices or min(choices) < 1:
        raise ValueError(f"chunks={chunks}: must be 1 or more")
    return choices


def _by_stage(costs: Costs, num_stages: int) -> Costs:
    """``costs`` with a number for each of the stages, so that they can be cut otherwise."""
    times = costs.by_kind(costs.num_stages or num_stages)
    return replace(
        costs,
        forward=times[Kind.F],
        backward_input=times[Kind.I],
        backward_weight=times[Kind.W],
        recompute=times[Kind.C],
        reduce=times[Kind.R],
        optimizer_step=times[Kind.O],
    )
