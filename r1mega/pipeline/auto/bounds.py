"""A lower bound of the objective: what no order of F, I and W can go below.

For a rank with first stage ``a`` and deepest stage ``d``, all of these hold for every table within the memory limit:

1. It cannot start before its *head*: the F of all stages before ``a``, with their communication.
2. From its first start to its first I (of stage ``d``, microbatch 0) at least the *lead* passes: the way of
   microbatch 0 from ``a`` to the loss and back to ``d``. Until then it can run nothing but F, at most as many as its
   memory holds. What is left of the lead is idle.
3. From the end of its last F (of stage ``d``, last microbatch) to its last I (of stage ``a``) at least the *lag*
   passes: the way of the last microbatch from ``d`` to the loss and back to ``a``. What the rank can run meanwhile is
   I and W of what it holds then, at most its memory limit. What is left of the lag is idle. Where not all F can come
   before the first I, this time and that of 2 lie apart, and their idle times add up.
4. When its last I ends it has run all its F and I, and those W without which the last F would not have found room; then
   the I of all stages before ``a`` follow, and the W of the last of them.

So a rank ends at ``head + work + idle`` at the earliest (1-3), and some rank at ``head + idle of 2 + F, I and forced W
+ way to the first stage`` (1, 2, 4). The bound is the largest over all ranks.
"""

from __future__ import annotations

from r1mega.pipeline.auto.problem import F, I, Problem, W


def lower_bound(problem: Problem) -> float:
    """A bound of the objective of ``problem`` from below, in the unit of its costs."""
    return max(max(_own_end(problem, rank), _end_of_chain(problem, rank)) for rank in range(problem.num_ranks))


def _own_end(problem: Problem, rank: int) -> float:
    """When ``rank`` ends at the earliest, less its offset."""
    stages = problem.stages_of[rank]
    work = problem.num_microbatches * sum(sum(problem.durations[3 * s : 3 * s + 3]) for s in stages)
    work += sum(problem.last[s] for s in stages)
    first, last = _idle_before_first_backward(problem, rank), _idle_before_last_backward(problem, rank)
    apart = problem.limits[rank] // 2 < problem.num_microbatches * problem.chunks
    return problem.heads[rank] + work + (first + last if apart else max(first, last)) - problem.offsets[rank]


def _end_of_chain(problem: Problem, rank: int) -> float:
    """When the last microbatch is through at the earliest, by what ``rank`` must have done before it hands it on."""
    stages, m = problem.stages_of[rank], problem.num_microbatches
    forwards_and_backwards = m * sum(problem.durations[3 * s + F] + problem.durations[3 * s + I] for s in stages)
    forced = max(0, problem.chunks * (m + 1) - problem.limits[rank]) * min(problem.durations[3 * s + W] for s in stages)
    start = problem.heads[rank] + _idle_before_first_backward(problem, rank)
    return start + forwards_and_backwards + forced + _tail(problem, stages[0])


def _idle_before_first_backward(problem: Problem, rank: int) -> float:
    stages = problem.stages_of[rank]
    lead = _way(problem, F, range(stages[0], problem.num_stages))
    lead += _way(problem, I, range(stages[-1] + 1, problem.num_stages)) + problem.delays[3 * stages[-1] + I]
    costs = sorted((problem.durations[3 * s + F] for s in stages), reverse=True)
    return max(0.0, lead - sum(_largest(costs, problem.num_microbatches, problem.limits[rank] // 2)))


def _idle_before_last_backward(problem: Problem, rank: int) -> float:
    stages = problem.stages_of[rank]
    lag = _way(problem, F, range(stages[-1], problem.num_stages)) - problem.durations[3 * stages[-1] + F]
    lag += _way(problem, I, range(stages[0] + 1, problem.num_stages)) + problem.delays[3 * stages[0] + I]
    return max(0.0, lag - _most_backward_work(problem, rank))


def _most_backward_work(problem: Problem, rank: int) -> float:
    """The longest time of I and W that a rank can have left when its last F ends, but for its last I and its last W.

    What it holds is ``i + w`` halves for ``i`` I and ``w`` W that are still to come, and no W comes without its I:
    ``i <= w``.
    """
    stages, m = problem.stages_of[rank], problem.num_microbatches
    inputs = sorted((problem.durations[3 * s + I] for s in stages), reverse=True)
    weights = sorted((problem.durations[3 * s + W] for s in stages), reverse=True)
    halves = problem.limits[rank]
    best = 0.0
    for i in range(1, halves // 2 + 1):
        w = min(halves - i, m * len(stages))
        best = max(best, sum(_largest(inputs, m, i - 1)) + sum(_largest(weights, m, w - 1)))
    return best


def _largest(costs: list[float], times: int, count: int) -> list[float]:
    """The ``count`` largest where each of the ``costs``, largest first, is there ``times`` times."""
    return [cost for cost in costs for _ in range(times)][: max(0, count)]


def _way(problem: Problem, kind: int, stages: range) -> float:
    """One microbatch through the F or I of consecutive ``stages``, with the communication between them."""
    codes = [3 * stage + kind for stage in stages]
    inner = codes[1:] if kind == F else codes[:-1]
    return sum(problem.durations[code] for code in codes) + sum(problem.delays[code] for code in inner)


def _tail(problem: Problem, stage: int) -> float:
    """From the end of the last I of ``stage`` to the end of a W on the way down, less the offset of its rank."""
    best, time = float("-inf"), 0.0
    for s in range(stage, -1, -1):
        if s < stage:
            time += problem.delays[3 * s + I] + problem.durations[3 * s + I]
        end = time + problem.durations[3 * s + W] + problem.last[s]
        best = max(best, end - problem.offsets[problem.stage_to_rank[s]])
    return best
