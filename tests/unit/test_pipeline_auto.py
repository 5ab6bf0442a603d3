"""``auto``: the search for schedules. Published figures of the Zero Bubble paper, optimality, memory limits."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys

import pytest

from r1mega.pipeline.actions import Action, Kind, Overlap, Table
from r1mega.pipeline.auto import AutoResult, best_table, exact, peak_memory, search, zb_greedy
from r1mega.pipeline.auto.bounds import lower_bound
from r1mega.pipeline.auto.improve import improve
from r1mega.pipeline.auto.list_scheduling import list_rows
from r1mega.pipeline.auto.problem import Problem
from r1mega.pipeline.auto.zb_greedy import greedy_rows
from r1mega.pipeline.checker import check
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.schedules import SCHEDULES, make_table, with_reductions
from r1mega.pipeline.simulator import simulate

# Ranks, microbatches, (F, I, W, communication), bubble rate of ZB-1p, of ZB-2p: arXiv 2401.10241 in milliseconds, and
# unit costs.
PUBLISHED = [
    (8, 24, (18.522, 18.086, 9.337, 0.601), 0.1585, 0.0433),
    (8, 32, (18.513, 18.086, 9.331, 0.626), 0.1242, 0.0039),
    (8, 64, (18.546, 18.097, 9.321, 0.762), 0.0674, 0.0026),
    (16, 48, (11.347, 11.248, 8.132, 0.377), 0.1397, 0.0066),
    (4, 8, (1, 1, 1, 0), 0.1111, 0.0),
    (8, 16, (1, 1, 1, 0), 0.1273, 0.0),
    (8, 32, (1, 1, 1, 0), 0.0680, 0.0),
]


def uneven(chance: random.Random, num_stages: int) -> Costs:
    def times(low: float, high: float) -> list[float]:
        return [chance.uniform(low, high) for _ in range(num_stages)]

    communication = chance.choice([0.0, 0.05, 0.4])
    return Costs(times(0.5, 2), times(0.5, 2), times(0.2, 1.5), communication, reduce=chance.choice([0.0, 0.3]))


def value(table: Table, costs: Costs, objective: str) -> float:
    simulation = simulate(table, costs)
    return simulation.makespan if objective == "makespan" else simulation.longest_rank


def named_within(limits: list[float], num_microbatches: int, chunks: int) -> list[Table]:
    tables = []
    for name, schedule in SCHEDULES.items():
        if schedule.chunks in (None, chunks):
            try:
                table = make_table(name, len(limits), num_microbatches, chunks if schedule.chunks is None else None)
            except ValueError:
                continue
            fits = all(peak <= limit for peak, limit in zip(peak_memory(table), limits, strict=True))
            if fits and table.num_copies == 1:
                tables.append(table)
    return tables


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "costs", "one_p", "two_p"), PUBLISHED)
def test_the_greedy_search_meets_the_published_bubbles(
    num_ranks: int, num_microbatches: int, costs: tuple[float, ...], one_p: float, two_p: float
) -> None:
    for times, published in ((1, one_p), (2, two_p)):
        table = zb_greedy(num_ranks, num_microbatches, Costs(*costs), times * num_ranks)
        check(table)
        assert max(peak_memory(table)) <= times * num_ranks
        simulation = simulate(table, Costs(*costs))
        rate = 1 - num_microbatches * sum(costs[:3]) / simulation.longest_rank
        assert round(rate, 4) == published
        assert simulation.bubble_rate == pytest.approx(rate, abs=1e-12)


def test_the_greedy_search_makes_a_table_within_the_limit_for_every_size_and_uneven_stages() -> None:
    chance = random.Random(2)
    for num_ranks, num_microbatches in itertools.product(range(1, 7), range(1, 9)):
        limits = [float(chance.randint(1, 2 * num_ranks)) for _ in range(num_ranks)]
        table = zb_greedy(num_ranks, num_microbatches, uneven(chance, num_ranks), limits)
        check(table)
        assert all(peak <= limit for peak, limit in zip(peak_memory(table), limits, strict=True))


def test_each_choice_of_the_greedy_rules_is_the_best_somewhere() -> None:
    chance = random.Random(1)
    best_by = set()
    for _ in range(60):
        num_ranks = chance.randint(2, 6)
        limits = [chance.choice([1.0, 1.5, 2.0]) * num_ranks] * num_ranks
        problem = Problem.of(range(num_ranks), 3 * num_ranks, uneven(chance, num_ranks), limits, "longest_rank")
        choices = list(itertools.product((True, False), repeat=3))  # in the order of greedy_rows
        timings = [problem.time(rows) for rows in greedy_rows(problem)]
        scores = [problem.score(timing)[0] for timing in timings if timing is not None]
        for index, choice in itertools.product(range(3), (True, False)):
            others = [s for s, c in zip(scores, choices, strict=True) if c[index] != choice]
            if min(scores) < min(others) * (1 - 1e-9):
                best_by.add((index, choice))
    assert len(best_by) == 6


def test_auto_is_never_worse_than_the_best_named_schedule_within_the_limit() -> None:
    chance = random.Random(3)
    better = compared = 0
    for _ in range(100):
        num_ranks, num_microbatches, chunks = chance.randint(2, 4), chance.randint(2, 8), chance.choice([1, 1, 2])
        costs = uneven(chance, num_ranks * chunks)
        limits = [float(chance.randint(num_ranks // chunks + 1, 2 * num_ranks))] * num_ranks
        objective = chance.choice(["makespan", "longest_rank"])
        result = best_table(num_ranks, num_microbatches, costs, limits[0], objective=objective, effort=0.02)
        check(result.table)
        found = value(result.table, costs, objective)
        assert result.value == found
        assert all(peak <= limit + 1e-9 for peak, limit in zip(peak_memory(result.table), limits, strict=True))
        assert result.lower_bound <= found * (1 + 1e-9)
        named = [value(table, costs, objective) for table in named_within(limits, num_microbatches, chunks)]
        if named:
            assert found <= min(named) * (1 + 1e-9)
            compared += 1
            better += found < min(named) * (1 - 1e-6)
    assert compared > 80 and better > 50, "where stages are uneven no named schedule fits well"


@pytest.mark.parametrize("objective", ["makespan", "longest_rank"])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 4), (3, 5), (4, 4), (4, 6)])
def test_small_tables_are_proved_optimal(num_ranks: int, num_microbatches: int, objective: str) -> None:
    chance = random.Random(4)
    for limit, costs in itertools.product((num_ranks, 2 * num_ranks), (Costs(1, 1, 1), uneven(chance, num_ranks))):
        result = best_table(num_ranks, num_microbatches, costs, limit, objective=objective, effort=0.5)
        assert result.proved_optimal, str(result)
        assert "proved optimal" in str(result)


def every_row(stage: int, num_microbatches: int) -> list[list[Action]]:
    """All orders of F, I, W of a stage, whatever the order of the microbatches."""
    rows: list[list[Action]] = [[]]
    for _ in range(3 * num_microbatches):
        longer = []
        for row in rows:
            for microbatch in range(num_microbatches):
                done = sum(action.microbatch == microbatch for action in row)
                if done < 3:
                    kind = (Kind.F, Kind.I, Kind.W)[done]
                    longer.append([*row, Action(kind, stage, microbatch)])
        rows = longer
    return rows


@pytest.mark.parametrize(("num_ranks", "limit"), [(2, 1.0), (2, 1.5), (2, 2.0), (3, 1.5)])
def test_no_table_at_all_is_better_than_one_that_is_proved_optimal(num_ranks: int, limit: float) -> None:
    """By trying them all, with microbatches in any order on any rank."""
    costs = uneven(random.Random(num_ranks), num_ranks)
    choices = []
    for stage in range(num_ranks):
        rows = every_row(stage, 2)
        choices.append([row for row in rows if peak_memory(Table([0], [row]))[0] <= limit])
    optimum = {"makespan": float("inf"), "longest_rank": float("inf")}
    for rows in itertools.product(*choices):
        try:
            simulation = simulate(Table(list(range(num_ranks)), with_reductions(rows)), costs)
        except ValueError:  # a deadlock
            continue
        optimum["makespan"] = min(optimum["makespan"], simulation.makespan)
        optimum["longest_rank"] = min(optimum["longest_rank"], simulation.longest_rank)
    for objective, best in optimum.items():
        result = best_table(num_ranks, 2, costs, limit, objective=objective, effort=0.5)
        assert result.proved_optimal
        assert result.value == pytest.approx(best, rel=1e-9)


def placements(num_ranks: int) -> list[list[int]]:
    ranks = list(range(num_ranks))
    return [ranks, ranks + ranks, ranks + ranks[::-1]]


def one_at_a_time(problem: Problem) -> list[list[int]]:
    """All that a rank does for one microbatch, then the next: runs within any limit, and is slow."""
    rows = []
    for stages in problem.stages_of:
        forwards, backwards = [3 * s for s in stages], [3 * s + kind for s in reversed(stages) for kind in (1, 2)]
        rows.append((forwards + backwards) * problem.num_microbatches)
    return rows


def test_first_tables_run_keep_the_limit_and_take_the_times_that_the_simulator_says() -> None:
    chance = random.Random(5)
    for num_ranks, num_microbatches in itertools.product((1, 2, 3), (1, 4)):
        for placement in placements(num_ranks):
            costs = uneven(chance, len(placement))
            limits = [chance.choice([1.0, 1.5, 2.0, 3.0]) for _ in range(num_ranks)]
            problem = Problem.of(
                placement, num_microbatches, costs, limits, chance.choice(["makespan", "longest_rank"])
            )
            for rows in list(list_rows(problem))[::5]:
                table = problem.table(rows)
                check(table)
                assert all(peak <= limit for peak, limit in zip(peak_memory(table), limits, strict=True))
                timing = problem.time(rows)
                assert timing is not None
                score = problem.score(timing)[0]
                assert score == pytest.approx(value(table, costs, problem.objective), rel=1e-12)
                assert lower_bound(problem) <= score * (1 + 1e-12)
                assert problem.rows(table) == rows


def test_local_improvement_betters_a_table_and_keeps_the_limit() -> None:
    problem = Problem.of(range(3), 6, uneven(random.Random(6), 3), [2.0, 3.0, 2.0], "makespan")
    rows = one_at_a_time(problem)
    before = problem.time(rows)
    improved = improve(problem, rows, 30_000)
    after = problem.time(improved)
    assert before is not None and after is not None
    assert problem.score(after) < problem.score(before)
    assert all(problem.fits(rank, row) for rank, row in enumerate(improved))
    assert max(peak_memory(problem.table(improved))) <= 3


def test_each_rank_may_have_its_own_limit() -> None:
    result = best_table(3, 6, Costs(1, 1, 1), [1.0, 2.5, 1.5], effort=0.1)
    assert [peak <= limit for peak, limit in zip(result.peak_memory, [1.0, 2.5, 1.5], strict=True)] == [True] * 3
    assert peak_memory(result.table) == result.peak_memory


def test_memory_counts_one_for_an_f_and_a_half_back_for_i_and_w() -> None:
    def peaks(csv: str) -> list[float]:
        return peak_memory(Table.from_csv(csv.replace(" ", ",")))

    assert peaks("0F0 0F1 0I0 0F2 0I1 0W0 0F3 0I2 0I3 0W1 0W2 0W3 0R") == [2.5]
    assert peaks("0F0 0F1 0B0 0F2 0B1 0B2 0R") == [2.0]
    overlapped = Table([0, 0], [[Action(Kind.F, 0, 0), Overlap(Action(Kind.F, 0, 1), Action(Kind.B, 0, 0))]])
    assert peak_memory(overlapped) == [1.0], "of two stages, each half of the rank's layers"


def test_of_several_numbers_of_chunks_the_best_is_taken() -> None:
    results = {
        str(chunks): best_table(2, 4, Costs([4, 3], [4, 3], [4, 3]), 2, chunks=chunks, effort=0.1)
        for chunks in (1, 2, (1, 2))
    }
    assert results["2"].value < results["1"].value
    assert results["(1, 2)"].value == results["2"].value
    assert results["(1, 2)"].lower_bound <= results["2"].lower_bound


def test_the_same_arguments_give_the_same_table() -> None:
    costs = uneven(random.Random(7), 3)
    first, second = (best_table(3, 4, costs, 2, objective="longest_rank", effort=0.1) for _ in range(2))
    assert (first.table, first.lower_bound) == (second.table, second.lower_bound)


def test_a_named_schedule_that_hides_work_by_overlaps_is_taken_and_not_below_the_bound() -> None:
    result = best_table(2, 8, Costs(1, 1, 1, overlap=0.6), 3, chunks=2, effort=0.05)
    assert result.found_by == "dualpipev"
    assert result.lower_bound <= result.value and not result.proved_optimal


HARD = dict(num_ranks=3, num_microbatches=4, memory_limit=3, chunks=2, objective="longest_rank", effort=0.02)


def test_without_the_exact_solver_the_result_says_so_and_gives_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = best_table(costs=Costs(1, 1, 1), **HARD)
    assert "OR-tools is not installed (pip install ortools)" in str(result)
    assert not result.proved_optimal and f"at most {result.gap:.2%} above the optimum" in str(result)
    assert result.value == pytest.approx(result.lower_bound * (1 + result.gap))


def test_large_tables_are_not_given_to_the_exact_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST_ACTIONS", 10)
    assert "72 actions are more than 10" in best_table(costs=Costs(1, 1, 1), **HARD).exact_solver


def test_the_exact_solver_finds_what_the_searches_did_not() -> None:
    result: AutoResult = best_table(4, 4, Costs(1, 1, 1), 2, chunks=2, effort=0.3)
    assert result.found_by == "exact solver" and result.value == 35


@pytest.mark.parametrize("placement", placements(2))
@pytest.mark.parametrize("objective", ["makespan", "longest_rank"])
def test_what_the_exact_solver_proves_is_what_its_table_takes(placement: list[int], objective: str) -> None:
    costs = Costs(1, 2, 1, communication=0.7, reduce=0.5)
    problem = Problem.of(placement, 3, costs, [2.0, 1.5], objective)
    proof = exact.solve(problem, one_at_a_time(problem), 5.0)
    assert proof.rows is not None
    assert proof.bound == pytest.approx(value(problem.table(proof.rows), costs, objective), rel=1e-9)
    assert exact.solve(problem, proof.rows, 5.0) == (pytest.approx(proof.bound), None), "there is none better"


def test_the_exact_solver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    problem = Problem.of([0], 1, Costs(1, 1, 1), [1.0], "makespan")
    with pytest.raises(ImportError, match="needs OR-tools: pip install ortools"):
        exact.solve(problem, [[0, 1, 2]], 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(memory_limit=0.5), r"memory_limit=0.5: must be 1 or more"),
        (dict(memory_limit=float("nan")), r"memory_limit=nan: must be 1 or more"),
        (dict(memory_limit=[1, 2, 3]), r"memory_limit: 3 numbers for 2 ranks"),
        (dict(chunks=0), r"chunks=0: must be 1 or more"),
        (dict(chunks=[]), r"chunks=\[\]: must be 1 or more"),
        (dict(costs=Costs([1, 1, 1], 1, 1)), r"costs are for 3 stages, which 2 ranks cannot hold"),
        (dict(num_microbatches=0), "needs a microbatch at least, not 0"),
        (dict(num_ranks=0), "needs a rank at least, not 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_table(**{"num_ranks": 2, "num_microbatches": 2, "costs": Costs(1, 1, 1), "memory_limit": 2} | arguments)


def test_the_greedy_search_refuses_a_limit_below_one_microbatch() -> None:
    with pytest.raises(ValueError, match=r"limit=0.5: must be 1 or more"):
        zb_greedy(2, 2, Costs(1, 1, 1), 0.5)
