"""The greedy search of Zero Bubble Pipeline Parallelism (arXiv 2401.10241, section 3.1), for one stage a rank.

Its rules, one microbatch after the other:

- Warm-up: each rank runs as many F as memory and the time until its first I allow.
- Then each rank runs one F and one I in turn, and W where there would be a bubble that is long enough for one; where it
  is too short a W comes all the same, unless the bubble may stay because another rank has a larger one already.
- A W comes, too, whenever memory does not suffice for the next F. At the end come all W that are left.

Three yes-or-no choices make eight variants (:class:`Rules`); the best one is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from r1mega.pipeline.actions import Table
from r1mega.pipeline.auto.problem import HALVES, F, I, Objective, Problem, Rows, W
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.schedules.common import require_positive


class Rules(NamedTuple):
    """What the paper leaves to a search."""

    late_first_backward: bool  # the last F of the warm-up may fill the gap only in part, and not delay the first I
    delay_forward: bool  # an F may be left out for a round where the next rank has enough of them
    always_fill: bool  # fill a bubble that is shorter than a W even where another rank has a larger bubble


def zb_greedy(
    num_ranks: int,
    num_microbatches: int,
    costs: Costs,
    limit: float | Sequence[float],
    objective: Objective = "longest_rank",
) -> Table:
    """The best table of the greedy search: ZB-1p where ``limit`` is the number of ranks, ZB-2p where it is twice that.

    Args:
        num_ranks: ranks of the pipeline, each with one stage.
        num_microbatches: microbatches of a step.
        costs: times of the stages.
        limit: the most memory of a rank, or of each one, in microbatches: an F adds 1, an I and a W give back 0.5 each.
        objective: the paper's is the longest rank.

    Raises:
        ValueError: ``limit`` is less than 1, or ``costs`` are for another number of stages.
    """
    require_positive(num_ranks, num_microbatches)
    limits = [limit] * num_ranks if isinstance(limit, (int, float)) else list(limit)
    if len(limits) != num_ranks or not all(each >= 1 for each in limits):
        raise ValueError(f"limit={limit}: must be 1 or more, for all ranks or for each of the {num_ranks}")
    problem = Problem.of(range(num_ranks), num_microbatches, costs, limits, objective)
    solutions = [(timing, rows) for rows in greedy_rows(problem) if (timing := problem.time(rows))]
    return problem.table(min(solutions, key=lambda solution: problem.score(solution[0]))[1])


def greedy_rows(problem: Problem) -> Iterator[Rows]:
    """What each variant makes of a problem with one stage a rank."""
    assert problem.chunks == 1
    for choices in itertools.product((True, False), repeat=3):
        yield _Greedy(problem, Rules(*choices)).run()


class _Greedy:
    """One variant at work. Ranks are stages here."""

    def __init__(self, problem: Problem, rules: Rules) -> None:
        self.problem, self.rules = problem, rules
        self.ranks = range(problem.num_ranks)
        self.rows: Rows = [[] for _ in self.ranks]
        self.ends: list[tuple[list[float], list[float], list[float]]] = [([], [], []) for _ in self.ranks]
        self.clocks = [0.0] * problem.num_ranks
        self.memory = [0] * problem.num_ranks
        self.bubbles = [0.0] * problem.num_ranks  # idle time after the first F

    def run(self) -> Rows:
        for rank in self.ranks:
            self.put(rank, F)
        for rank, forwards in enumerate(self.warm_up()):
            for _ in range(forwards):
                self.put(rank, F)
        for rank in reversed(self.ranks):
            self.put(rank, I)
        for _ in range(1, self.problem.num_microbatches):
            for rank in self.ranks_with_forward():
                self.make_room(rank)
                self.fill(rank, F)
                self.put(rank, F)
            for rank in reversed(self.ranks):
                self.fill(rank, I)
                if rank == 0 and self.count(0, F) == self.problem.num_microbatches:
                    self.run_pending(0)  # nobody waits for what the first rank's I makes
                self.put(rank, I)
        for rank in self.ranks:
            self.run_pending(rank)
        return self.rows

    def warm_up(self) -> list[int]:
        """For each rank how many F it runs before its first I, besides the one it has run."""
        forwards = [0] * len(self.ranks)
        arrival = 0.0  # of the first gradients
        for rank in reversed(self.ranks):
            clock, cost = self.clocks[rank], self.cost(rank, F)
            if rank < len(self.ranks) - 1:
                while self.forward_fits(rank, forwards[rank]) and (
                    clock + cost <= arrival if self.rules.late_first_backward else clock < arrival
                ):
                    forwards[rank] += 1
                    clock += cost
            arrival = max(clock, arrival) + self.cost(rank, I) + self.problem.communication
        for rank in self.ranks[1:]:  # a rank has one F less to run than the rank before, unless all have come by
            most = forwards[rank - 1]
            all_of_them = most == self.problem.num_microbatches - 1
            forwards[rank] = max(0, min(forwards[rank], most if all_of_them else most - 1))
        return forwards

    def forward_fits(self, rank: int, more: int) -> bool:
        """Whether there is room and a microbatch for an F after ``more`` others."""
        enough = self.count(rank, F) + more < self.problem.num_microbatches
        return enough and self.memory[rank] + HALVES[F] * (more + 1) <= self.problem.limits[rank]

    def ranks_with_forward(self) -> range:
        """The ranks that run an F this round: where one runs none, none before it does."""
        skipped = [rank for rank in self.ranks if not self.wants_forward(rank)]
        return self.ranks[skipped[-1] + 1 if skipped else 0 :]

    def wants_forward(self, rank: int) -> bool:
        if self.count(rank, F) == self.problem.num_microbatches:
            return False
        ahead = rank < len(self.ranks) - 1 and self.count(rank, F) >= self.count(rank + 1, F) + 2
        if not (ahead and self.rules.delay_forward):
            return True
        following = self.cost(rank + 1, F) + self.cost(rank + 1, I)
        gradients = self.clocks[rank + 1] + following + self.problem.communication  # when they can be here
        if self.clocks[rank] >= gradients:
            return False
        missing = self.memory[rank] + HALVES[F] - self.problem.limits[rank]
        pending = self.count(rank, I) - self.count(rank, W)
        duration = self.cost(rank, F) + max(0, min(missing, pending)) * self.cost(rank, W)
        return self.clocks[rank] + duration <= gradients or gradients - self.clocks[rank] > self.slack(rank)

    def make_room(self, rank: int) -> None:
        while self.memory[rank] + HALVES[F] > self.problem.limits[rank]:
            self.put(rank, W)

    def fill(self, rank: int, kind: int) -> None:
        """Use the time until the next ``kind`` can start for W."""
        arrival = self.arrival(rank, kind)
        cost = self.cost(rank, W)
        while self.has_pending(rank) and self.clocks[rank] + cost <= arrival:
            self.put(rank, W)
        gap = arrival - self.clocks[rank]
        if gap > 0 and self.has_pending(rank) and (self.rules.always_fill or gap > self.slack(rank)):
            self.put(rank, W)

    def run_pending(self, rank: int) -> None:
        while self.has_pending(rank):
            self.put(rank, W)

    def put(self, rank: int, kind: int) -> None:
        clock = self.clocks[rank]
        start = max(clock, self.arrival(rank, kind))
        if self.rows[rank]:
            self.bubbles[rank] += start - clock
        self.clocks[rank] = start + self.cost(rank, kind)
        self.ends[rank][kind].append(self.clocks[rank])
        self.memory[rank] += HALVES[kind]
        self.rows[rank].append(3 * rank + kind)

    def arrival(self, rank: int, kind: int) -> float:
        """When what the next ``kind`` takes from another rank is there."""
        source = {F: rank - 1, I: rank + 1}.get(kind, -1)
        if source not in self.ranks:
            return 0.0
        return self.ends[source][kind][self.count(rank, kind)] + self.problem.communication

    def slack(self, rank: int) -> float:
        """How much longer the bubble of ``rank`` may get without being the largest."""
        return max(self.bubbles) - self.bubbles[rank]

    def has_pending(self, rank: int) -> bool:
        return self.count(rank, W) < self.count(rank, I)

    def cost(self, rank: int, kind: int) -> float:
        return self.problem.durations[3 * rank + kind]

    def count(self, rank: int, kind: int) -> int:
        return len(self.ends[rank][kind])
