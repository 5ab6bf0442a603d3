"""Local improvement: moves of single actions on the critical path, accepted by late acceptance hill climbing.

Only what lies on the critical path (the chain of actions, each starting as the one before it ends or arrives, that ends
with the objective) can make a table faster. A move is kept where the result is no worse than the one now, or than the
one ``MEMORY`` moves ago (Burke and Bykov, The late acceptance hill-climbing heuristic, 2017), so that the search leaves
local optima; the best table of all is what it returns. The same problem gives the same moves.
"""

from __future__ import annotations

import random

from r1mega.pipeline.auto.problem import Problem, Rows, Timing

MEMORY = 40


def improve(problem: Problem, rows: Rows, num_actions: int, enough: float = 0.0) -> Rows:
    """The best rows found from ``rows`` on.

    Args:
        problem: what to solve.
        rows: a solution.
        num_actions: how many actions to time in all; the work is in proportion to it.
        enough: stop when the objective is no more than this.
    """
    timing = problem.time(rows)
    assert timing is not None
    chance = random.Random(0)
    score = best_score = problem.score(timing)
    best, history = rows, [score] * MEMORY
    for move in range(num_actions // max(1, sum(map(len, rows)))):
        if best_score[0] <= enough:
            break
        changed = _moved(problem, rows, timing, chance)
        changed_timing = problem.time(changed) if changed else None
        if changed is None or changed_timing is None:
            continue
        changed_score = problem.score(changed_timing)
        if changed_score <= max(score, history[move % MEMORY]):
            rows, timing, score = changed, changed_timing, changed_score
        if score < best_score:
            best, best_score = rows, score
        history[move % MEMORY] = score
    return best


def _moved(problem: Problem, rows: Rows, timing: Timing, chance: random.Random) -> Rows | None:
    """``rows`` with an action of the critical path somewhere near in its row; None where that is not allowed."""
    rank, position = chance.choice(_critical_path(problem, rows, timing))
    row = list(rows[rank])
    code = row.pop(position)
    distance = chance.choice((1, 1, 1, 2, 2, 3, 4, 6, 8))
    target = max(0, min(len(row), position + chance.choice((-distance, distance))))
    row.insert(target, code)
    if row == rows[rank] or not problem.fits(rank, row):
        return None
    return [*rows[:rank], row, *rows[rank + 1 :]]


def _critical_path(problem: Problem, rows: Rows, timing: Timing) -> list[tuple[int, int]]:
    """(rank, position) of the actions that decide the objective, from the last to the first."""
    where: dict[tuple[int, int], tuple[int, int]] = {}  # (code, microbatch) -> (rank, position)
    microbatches: list[list[int]] = []
    for rank, row in enumerate(rows):
        counts = [0] * len(problem.durations)
        microbatches.append([])
        for position, code in enumerate(row):
            where[code, counts[code]] = (rank, position)
            microbatches[-1].append(counts[code])
            counts[code] += 1
    totals = [ends[-1] - offset for ends, offset in zip(timing.ends, problem.offsets, strict=True)]
    rank = totals.index(max(totals))
    position = len(rows[rank]) - 1
    path = []
    while True:
        path.append((rank, position))
        start = timing.starts[rank][position]
        if position and timing.ends[rank][position - 1] >= start:
            position -= 1
            continue
        before = problem.predecessors[rows[rank][position]]
        if before < 0:
            return path
        rank, position = where[before, microbatches[rank][position]]
