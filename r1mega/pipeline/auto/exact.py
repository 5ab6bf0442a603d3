"""The exact solver: constraint programming with OR-tools' CP-SAT, which proves small tables optimal."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

from r1mega.pipeline.auto.bounds import lower_bound
from r1mega.pipeline.auto.problem import HALVES, F, I, Problem, Rows, W

TICKS = 10**7  # of the longest cost, where costs are no multiples of a common unit
SMALL = 10**6
CONFLICTS = 3000  # of the solver at most, for one unit of deterministic time


class Proof(NamedTuple):
    """What the solver found: a lower bound of the objective, and rows, None where it found none that are better."""

    bound: float
    rows: Rows | None


class Variables(NamedTuple):
    """Of the model: starts by code and microbatch, and what is to be small."""

    starts: list[list[Any]]
    objective: Any


def solve(problem: Problem, known: Rows, effort: float) -> Proof:
    """Search for the optimum, or prove that there is none better than ``known``.

    The solver is asked for better tables only, rather than given ``known`` as a hint: with a hint it was seen to raise
    its bound tick by tick. Costs become whole numbers, rounded down, so that the bound holds for the true ones. One
    thread, a fixed seed, and limits in the solver's deterministic time (``effort``, about seconds) and in conflicts:
    the same problem gives the same answer.

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
    variables = _build(model, whole)
    timing = whole.time(known)
    assert timing is not None
    to_beat = int(whole.score(timing)[0])
    model.add(variables.objective <= to_beat - 1)
    model.minimize(variables.objective)
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
    rows = _rows(problem, [[solver.value(start) for start in row] for row in variables.starts])
    runs = all(problem.fits(rank, row) for rank, row in enumerate(rows)) and problem.time(rows) is not None
    return Proof(bound, rows if runs else None)


def _build(model: Any, problem: Problem) -> Variables:
    """The model: variables for the start of each code and microbatch, and for the objective, with all constraints."""
    microbatches, horizon = range(problem.num_microbatches), _horizon(problem)
    starts = [[model.new_int_var(0, horizon, "") for _ in microbatches] for _ in problem.durations]
    ends = [[start + int(time) for start in row] for row, time in zip(starts, problem.durations, strict=True)]
    for stage, more in enumerate(problem.last):
        ends[3 * stage + W][-1] += int(more)
    for code, before in enumerate(problem.predecessors):
        for m in microbatches:
            if m:
                model.add(starts[code][m] >= ends[code][m - 1])
            if before >= 0:
                model.add(starts[code][m] >= ends[before][m] + int(problem.delays[code]))
    objective = model.new_int_var(math.ceil(lower_bound(problem)), horizon, "objective")
    for rank, stages in enumerate(problem.stages_of):
        model.add(starts[3 * stages[0]][0] == int(problem.heads[rank]))
        for stage in stages:
            model.add(objective >= ends[3 * stage + W][-1] - int(problem.offsets[rank]))
        _one_at_a_time(model, problem, rank, starts, ends)
    return Variables(starts, objective)


def _one_at_a_time(model: Any, problem: Problem, rank: int, starts: list[list[Any]], ends: list[list[Any]]) -> None:
    """Which of two actions of a rank comes first is a yes or no; memory then is a sum of such answers.

    That makes CP-SAT much faster than intervals in a cumulative constraint, whose bounds it moves tick by tick.
    """
    m, codes = problem.num_microbatches, [3 * s + kind for s in problem.stages_of[rank] for kind in (F, I, W)]
    first: dict[tuple[int, int, int, int], Any] = {}  # (code, microbatch, other code, its microbatch) -> first of both
    for code, other in itertools.combinations(codes, 2):
        for k, j in itertools.product(range(m), repeat=2):
            answer = _known(problem, code, k, other, j)
            if answer is None:
                answer = model.new_bool_var("")
                model.add(starts[other][j] >= ends[code][k]).only_enforce_if(answer)
                model.add(starts[code][k] >= ends[other][j]).only_enforce_if(~answer)
            first[code, k, other, j] = answer
            first[other, j, code, k] = not answer if isinstance(answer, bool) else ~answer
            if k:
                model.add_implication(answer, first[code, k - 1, other, j])
            if j:
                model.add_implication(first[code, k, other, j - 1], answer)
    for code, k in itertools.product(codes[::3], range(m)):
        held = sum(HALVES[other % 3] * first[other, j, code, k] for other in codes if other != code for j in range(m))
        model.add(HALVES[F] * (k + 1) + held <= problem.limits[rank])


def _known(problem: Problem, code: int, microbatch: int, other: int, its_microbatch: int) -> bool | None:
    """Which of two actions comes first, where the way of a microbatch through the model decides it."""
    if microbatch <= its_microbatch and code % 3 != W and _place(problem, code) < _place(problem, other):
        return True
    if its_microbatch <= microbatch and other % 3 != W and _place(problem, other) < _place(problem, code):
        return False
    return None


def _place(problem: Problem, code: int) -> float:
    """Where on the way of a microbatch: F of all stages, then I of all stages, each followed by its W."""
    stage, kind = divmod(code, 3)
    return stage if kind == F else 2 * problem.num_stages - 1 - stage + (0.5 if kind == W else 0)


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
