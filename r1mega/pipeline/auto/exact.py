"""The exact solver: constraint programming with OR-tools' CP-SAT, which proves small tables optimal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from r1mega.pipeline.auto.bounds import lower_bound
from r1mega.pipeline.auto.problem import F, I, Problem, Rows, W

TICKS = 10**7  # of the longest cost, where costs are no multiples of a common unit
SMALL = 10**6
CONFLICTS = 3000  # of the solver at most, for one unit of deterministic time


class Proof(NamedTuple):
    """What the solver found: a lower bound of the objective, and rows, None where it found none that are better."""

    bound: float
    rows: Rows | None


def solve(problem: Problem, known: Rows, effort: float) -> Proof:
    """Search for the optimum, or prove that there is none better than ``known``.

    The solver is asked for better tables only, rather than given ``known`` as a hint: with a hint it was seen to raise
    its bound tick by tick. Costs become whole numbers, rounded down, so that the bound holds for the true ones. One thread, a fixed seed and a
    limit in the solver's deterministic time (``effort``, about seconds): the same problem gives the same answer.

    Raises:
        ImportError: OR-tools is not installed; says what to do.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ImportError("the exact solver needs OR-tools: pip install ortools") from error
    tick = _tick(problem)
    whole = _in_ticks(problem, tick)
    model = cp_model.CpModel()
    starts, objective = _build(model, whole)
    timing = whole.time(known)
    assert timing is not None
    to_beat = int(whole.score(timing)[0])
    model.add(objective <= to_beat - 1)
    model.minimize(objective)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = effort
    solver.parameters.max_number_of_conflicts = int(effort * CONFLICTS)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return Proof(to_beat * tick, None)
    bound = solver.best_objective_bound * tick
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Proof(bound, None)
    rows = _rows(problem, [[solver.value(start) for start in row] for row in starts])
    runs = all(problem.fits(rank, row) for rank, row in enumerate(rows)) and problem.time(rows) is not None
    return Proof(bound, rows if runs else None)


def _build(model: Any, problem: Problem) -> tuple[list[list[Any]], Any]:
    """Variables for the start of each code and microbatch, all constraints, and a variable for the objective."""
    microbatches, horizon = range(problem.num_microbatches), _horizon(problem)
    size = [int(duration) for duration in problem.durations]
    starts = [[model.new_int_var(0, horizon, f"{code}.{m}") for m in microbatches] for code in range(len(size))]
    for code, before in enumerate(problem.predecessors):
        for m in microbatches:
            if m:
                model.add(starts[code][m] >= starts[code][m - 1] + size[code])
            if before >= 0:
                model.add(starts[code][m] >= starts[before][m] + size[before] + int(problem.delays[code]))
    objective = model.new_int_var(math.ceil(lower_bound(problem)), horizon, "objective")
    for rank, stages in enumerate(problem.stages_of):
        model.add(starts[3 * stages[0]][0] == int(problem.heads[rank]))
        busy = []
        for code in (3 * s + kind for s in stages for kind in (F, I, W)):
            sizes = [size[code]] * len(microbatches)
            if code % 3 == W:
                sizes[-1] += int(problem.last[code // 3])
                model.add(objective >= starts[code][-1] + sizes[-1] - int(problem.offsets[rank]))
            busy += [model.new_fixed_size_interval_var(starts[code][m], sizes[m], "") for m in microbatches]
        model.add_no_overlap(busy)
        _limit_memory(model, problem, rank, starts)
    return starts, objective


def _limit_memory(model: Any, problem: Problem, rank: int, starts: list[list[Any]]) -> None:
    """One half of an F's memory is held to the end of its I, the other to the end of its W."""
    if problem.limits[rank] >= 2 * problem.chunks * problem.num_microbatches:
        return
    held = []
    for s in problem.stages_of[rank]:
        for m in range(problem.num_microbatches):
            for kind in (I, W):
                end = starts[3 * s + kind][m] + int(problem.durations[3 * s + kind])
                length = model.new_int_var(0, _horizon(problem), "")
                held.append(model.new_interval_var(starts[3 * s + F][m], length, end, ""))
    model.add_cumulative(held, [1] * len(held), problem.limits[rank])


def _horizon(problem: Problem) -> int:
    """More time than any table needs."""
    return int((sum(problem.durations) + sum(problem.delays)) * problem.num_microbatches + sum(problem.last)) + 1


def _in_ticks(problem: Problem, tick: float) -> Problem:
    """The problem with all times in whole ticks, rounded down."""

    def ticks(time: float) -> int:
        return math.floor(time / tick + 1e-6)

    return replace(
        problem,
        durations=tuple(map(ticks, problem.durations)),
        last=tuple(map(ticks, problem.last)),
        communication=ticks(problem.communication),
    )


def _tick(problem: Problem) -> float:
    """The unit of time for the solver: what all costs are multiples of, if that is not too small."""
    costs = [cost for cost in (*problem.durations, *problem.last, problem.communication) if cost > 0]
    if not costs:
        return 1.0
    for digits in range(4):
        whole = [round(cost * 10**digits) for cost in costs]
        if all(math.isclose(w, cost * 10**digits, rel_tol=1e-12) for w, cost in zip(whole, costs, strict=True)):
            unit = math.gcd(*whole)
            if max(whole) // unit <= SMALL:
                return unit / 10**digits
    return max(costs) / TICKS


def _rows(problem: Problem, times: list[list[int]]) -> Rows:
    """Each rank's codes in the order of their starts. At the same time W and I come before F, but after their own."""
    rows: Rows = []
    for stages in problem.stages_of:
        codes = [3 * s + kind for s in stages for kind in (F, I, W)]
        actions = sorted((times[code][m], m, code) for code in codes for m in range(problem.num_microbatches))
        rows.append([code for _, _, code in actions])
    return rows
