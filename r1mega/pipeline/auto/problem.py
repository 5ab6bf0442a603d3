"""A scheduling problem in numbers, and its solutions in a form that a search can change and time quickly.

All microbatches are alike. So each stage may run its F in the order of the microbatches, its I, and its W, too, and
nothing is lost: hand the k-th F of a stage the k-th microbatch that reaches it, and a table with any other order
becomes one with this order, in the same times and the same memory. A row is then a list of *codes*,
``3 * stage + (0 for F, 1 for I, 2 for W)``; which microbatch a code means follows from how often it came before.

A full backward (B) is I and W in a row here, which can only be better: what I hands on leaves before the W.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from r1mega.pipeline.actions import Action, Kind, Overlap, Table
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.schedules import with_reductions

Objective = Literal["makespan", "longest_rank"]
Rows = list[list[int]]

KINDS = (Kind.F, Kind.I, Kind.W)
F, I, W = range(3)  # noqa: E741
HALVES = (2, -1, -1)  # what F, I and W add to the memory, in halves of a stage's activations of one microbatch


class Timing(NamedTuple):
    """When the actions of each row start and end."""

    starts: list[list[float]]
    ends: list[list[float]]


@dataclass(frozen=True)
class Problem:
    """What is to be scheduled. One copy of the model, an equal number of stages (``chunks``) on every rank.

    Args:
        stage_to_rank: the rank of each stage; the first ``num_ranks`` stages are on different ranks.
        num_microbatches: microbatches of a step.
        durations: for each code its time.
        last: for each stage what its last W takes longer: R and O come right after it.
        communication: between two ranks; nothing is charged within a rank.
        limits: for each rank the most memory, in halves of a stage's activations of one microbatch.
        objective: what is to be small. ``makespan``: the time until the last rank ends; ``longest_rank``: the longest
            time of any one rank from its first start to its last end.
    """

    stage_to_rank: tuple[int, ...]
    num_microbatches: int
    durations: tuple[float, ...]
    last: tuple[float, ...]
    communication: float
    limits: tuple[int, ...]
    objective: Objective

    @classmethod
    def of(
        cls,
        stage_to_rank: Sequence[int],
        num_microbatches: int,
        costs: Costs,
        limits: Sequence[float],
        objective: Objective,
    ) -> Problem:
        """The problem for ``costs`` of ``len(stage_to_rank)`` stages; ``limits`` in microbatches of a rank's layers."""
        times = costs.by_kind(len(stage_to_rank))
        chunks = len(stage_to_rank) // len(limits)
        return cls(
            tuple(stage_to_rank),
            num_microbatches,
            tuple(times[kind][stage] for stage in range(len(stage_to_rank)) for kind in KINDS),
            tuple(r + o for r, o in zip(times[Kind.R], times[Kind.O], strict=True)),
            float(costs.communication),
            tuple(min(_halves(limit, chunks), 2 * chunks * num_microbatches) for limit in limits),
            objective,
        )

    @property
    def num_ranks(self) -> int:
        return len(self.limits)

    @property
    def num_stages(self) -> int:
        return len(self.stage_to_rank)

    @property
    def chunks(self) -> int:
        return self.num_stages // self.num_ranks

    @cached_property
    def stages_of(self) -> list[list[int]]:
        """For each rank its stages, from the first to the last."""
        return [[s for s, owner in enumerate(self.stage_to_rank) if owner == r] for r in range(self.num_ranks)]

    @cached_property
    def predecessors(self) -> list[int]:
        """For each code the code that must have come as often before; -1 for the F of the first stage."""
        before = []
        for stage in range(self.num_stages):
            is_last = stage == self.num_stages - 1
            before += [3 * (stage - 1) if stage else -1, 3 * stage if is_last else 3 * stage + 4, 3 * stage + 1]
        return before

    @cached_property
    def delays(self) -> list[float]:
        """For each code the communication between its predecessor's end and its start."""
        rank = self.stage_to_rank
        return [
            self.communication if before >= 0 and rank[before // 3] != rank[code // 3] else 0.0
            for code, before in enumerate(self.predecessors)
        ]

    @cached_property
    def heads(self) -> list[float]:
        """For each rank when it starts: the F of microbatch 0 on its first stage is the first thing that it can do."""
        heads, time = [0.0] * self.num_ranks, 0.0
        for stage in range(self.num_ranks):
            time += self.delays[3 * stage]
            heads[self.stage_to_rank[stage]] = time
            time += self.durations[3 * stage]
        return heads

    @cached_property
    def offsets(self) -> list[float]:
        """The objective is the largest ``end - offset`` of all ranks."""
        return self.heads if self.objective == "longest_rank" else [0.0] * self.num_ranks

    def time(self, rows: Rows) -> Timing | None:
        """Run each row as early as its order allows; None where that is a deadlock."""
        predecessors, delays, durations = self.predecessors, self.delays, self.durations
        ended: list[list[float]] = [[] for _ in durations]  # by code, then microbatch
        starts: list[list[float]] = [[] for _ in rows]
        ends: list[list[float]] = [[] for _ in rows]
        waiting = [-1] * len(durations)  # code that is waited for -> rank that waits
        ready = deque(range(len(rows)))
        while ready:
            rank = ready.popleft()
            row, start_times, end_times = rows[rank], starts[rank], ends[rank]
            now = end_times[-1] if end_times else 0.0
            for position in range(len(end_times), len(row)):
                code = row[position]
                done, before = ended[code], predecessors[code]
                if before >= 0:
                    if len(ended[before]) <= len(done):
                        waiting[before] = rank
                        break
                    now = max(now, ended[before][len(done)] + delays[code])
                start_times.append(now)
                now += durations[code]
                if code % 3 == W and len(done) == self.num_microbatches - 1:
                    now += self.last[code // 3]
                end_times.append(now)
                done.append(now)
                if waiting[code] >= 0:
                    ready.append(waiting[code])
                    waiting[code] = -1
        if any(len(end_times) < len(row) for row, end_times in zip(rows, ends, strict=True)):
            return None
        return Timing(starts, ends)

    def score(self, timing: Timing) -> tuple[float, float]:
        """The objective, and the sum over ranks that decides between equals."""
        totals = [ends[-1] - offset for ends, offset in zip(timing.ends, self.offsets, strict=True)]
        return max(totals), sum(totals)

    def fits(self, rank: int, row: Sequence[int]) -> bool:
        """Whether ``row`` keeps to the memory limit and runs no I before its F and no W before its I."""
        memory, limit = 0, self.limits[rank]
        counts = [0] * len(self.durations)
        for code in row:
            kind = code % 3
            memory += HALVES[kind]
            counts[code] += 1
            if memory > limit or (kind != F and counts[code] > counts[code - 1]):
                return False
        return True

    def table(self, rows: Rows) -> Table:
        """``rows`` as a table, with an R at the end of each stage."""
        named: list[list[Action | Overlap]] = []
        for row in rows:
            counts = [0] * len(self.durations)
            named.append([])
            for code in row:
                named[-1].append(Action(KINDS[code % 3], code // 3, counts[code]))
                counts[code] += 1
        return Table(list(self.stage_to_rank), with_reductions(named))

    def rows(self, table: Table) -> Rows:
        """``table`` as codes: overlaps one after the other, each B as I and W, recomputation left out."""
        rows: Rows = []
        for rank in range(table.num_ranks):
            rows.append([])
            for action in table.actions(rank):
                if action.kind is Kind.B:
                    rows[-1] += [3 * action.stage + I, 3 * action.stage + W]
                elif action.kind in KINDS:
                    rows[-1].append(3 * action.stage + KINDS.index(action.kind))
        return rows


def peak_memory(table: Table) -> list[float]:
    """For each rank the most memory, where an F adds a microbatch's activations and I and W give back half each.

    In microbatches of one rank's layers (the model divided by the number of ranks). A B gives back all at its end. This
    is the unit of the Zero Bubble paper's limits; the checker and the simulator count more carefully, all until the W.
    """
    share = table.num_ranks / table.stages_per_copy
    given_back = {Kind.I: 0.5, Kind.W: 0.5, Kind.B: 1.0}
    peaks = []
    for row in table.rows:
        held, peak = 0.0, 0.0
        for cell in row:
            actions = cell if isinstance(cell, Overlap) else (cell,)
            held += sum(action.kind is Kind.F for action in actions)
            peak = max(peak, held)
            held -= sum(given_back.get(action.kind, 0.0) for action in actions)
        peaks.append(peak * share)
    return peaks


def _halves(limit: float, chunks: int) -> int:
    return math.floor(2 * chunks * min(limit, 1e9) + 1e-9)
