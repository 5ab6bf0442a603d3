"""List scheduling: whenever a rank is free it starts the best thing that it can, by rules. For any number of chunks.

No table that these rules make can get stuck: an F of a rank's n-th stage leaves room for one F of each deeper stage of
the rank. So the oldest microbatch always finds room on its way to the loss and back, and gives back what it holds.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from r1mega.pipeline.auto.problem import HALVES, F, I, Problem, Rows, W


class Rules(NamedTuple):
    """How a rank chooses.

    Args:
        deep_first: of several F, the one of the deepest stage; else the one of the first stage.
        alternate: after an I an F comes first; else an I always does.
        patience: a W is not begun where that would delay an F or I which is known to come by more than this share of
            the W's time.
        depth: F that a rank runs before its first I, as a share of what memory allows.
    """

    deep_first: bool
    alternate: bool
    patience: float
    depth: float


def list_rows(problem: Problem) -> Iterator[Rows]:
    """What each set of rules makes of ``problem``."""
    deep = (True, False) if problem.chunks > 1 else (True,)
    for choices in itertools.product(deep, (False, True), (0.0, 0.5, 1.0), (1.0, 0.75, 0.5)):
        yield _ListScheduling(problem, Rules(*choices)).run()


class _ListScheduling:
    def __init__(self, problem: Problem, rules: Rules) -> None:
        self.problem, self.rules = problem, rules
        self.rows: Rows = [[] for _ in range(problem.num_ranks)]
        self.clocks = [0.0] * problem.num_ranks
        self.memory = [0] * problem.num_ranks
        self.ends: list[list[float]] = [[] for _ in problem.durations]
        self.limits = [self._limit(rank) for rank in range(problem.num_ranks)]

    def _limit(self, rank: int) -> int:
        least = HALVES[F] * self.problem.chunks
        return max(least, int(self.problem.limits[rank] * self.rules.depth))

    def run(self) -> Rows:
        """Go from event to event: a rank is free, or something has come for it."""
        problem = self.problem
        remaining = 3 * problem.num_stages * problem.num_microbatches
        successors: list[list[int]] = [[] for _ in problem.durations]
        for after, before in enumerate(problem.predecessors):
            if before >= 0:
                successors[before].append(after)
        events = [(0.0, rank) for rank in range(problem.num_ranks)]
        while remaining:
            now, rank = heapq.heappop(events)
            if self.clocks[rank] > now:
                continue
            code = self.choose(rank, now)
            if code is None:
                continue
            self.start(rank, code, now)
            remaining -= 1
            heapq.heappush(events, (self.clocks[rank], rank))
            for after in successors[code]:
                owner = problem.stage_to_rank[after // 3]
                heapq.heappush(events, (self.clocks[rank] + problem.delays[after], owner))
        return self.rows

    def start(self, rank: int, code: int, now: float) -> None:
        self.clocks[rank] = now + self.problem.durations[code]
        self.ends[code].append(self.clocks[rank])
        self.memory[rank] += HALVES[code % 3]
        self.rows[rank].append(code)

    def arrival(self, code: int) -> float | None:
        """When the next action of this code could start; None where that is not known yet, or none is left."""
        done = len(self.ends[code])
        before = self.problem.predecessors[code]
        if done == self.problem.num_microbatches:
            return None
        if before < 0:
            return 0.0
        return self.ends[before][done] + self.problem.delays[code] if len(self.ends[before]) > done else None

    def choose(self, rank: int, now: float) -> int | None:
        """What ``rank`` starts now; None where it waits."""
        stages = self.problem.stages_of[rank]
        coming: list[tuple[float, int]] = []
        for code in self._preferred(rank):
            arrival = self.arrival(code)
            if arrival is not None and (code % 3 == I or self._has_room(rank, code // 3)):
                if arrival <= now:
                    return code
                coming.append((arrival, code))
        pending = [3 * stage + W for stage in stages if len(self.ends[3 * stage + W]) < len(self.ends[3 * stage + I])]
        if not pending:
            return None
        cost = self.problem.durations[pending[-1]]
        if coming and now + cost - min(coming)[0] > self.rules.patience * cost:
            return None
        return pending[-1]

    def _preferred(self, rank: int) -> list[int]:
        """The rank's F and I, the most wanted first. Deeper stages hold older microbatches, so their I come first."""
        stages = self.problem.stages_of[rank]
        forwards = [3 * s + F for s in (reversed(stages) if self.rules.deep_first else stages)]
        backwards = [3 * s + I for s in stages]
        last = next((code % 3 for code in reversed(self.rows[rank]) if code % 3 != W), None)
        return forwards + backwards if self.rules.alternate and last == I else backwards + forwards

    def _has_room(self, rank: int, stage: int) -> bool:
        stages = self.problem.stages_of[rank]
        deeper = len(stages) - 1 - stages.index(stage)
        return self.memory[rank] + HALVES[F] * (1 + deeper) <= self.limits[rank]
