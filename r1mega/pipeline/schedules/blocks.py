"""Schedules over a V of stages that repeat one block of actions for each microbatch: ZBV, V-Half, V-Min.

Two stages a rank in a V, rank ``r`` holding stages ``r`` and ``2p - 1 - r``. A block gives each rank the slots in which
microbatch 0 does its four actions: forward down the V, forward up, backward down, backward up; microbatch ``m`` does
them ``6 m`` slots later, which leaves two slots of six for the weight gradients. How long a block lasts decides how
many are on their way at once, that is the peak activations (arXiv 2405.15362, "Pipeline Parallelism with Controllable
Memory"). The table then comes from a greedy run in the order of these slots, with every action taking one slot.
"""

from __future__ import annotations

from typing import NamedTuple

from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.schedules.common import Row, require_positive, v_placement, with_reductions

PERIOD = 6  # slots: F, I and W of both stages of a rank


class Block(NamedTuple):
    """The slots in which a rank does its actions of microbatch 0."""

    forward_down: int
    forward_up: int
    backward_down: int
    backward_up: int


def zbv(num_ranks: int, num_microbatches: int) -> Table:
    """ZBV: no bubble on any rank where F, I and W take the same time (arXiv 2401.10241, section 6).

    Peak activations ``p``, as 1F1B. The ranks stop as they started, one after the other: the whole pipeline takes
    ``p - 1`` slots more than a rank.
    """
    p = num_ranks
    # forwards as early as the memory of p microbatches allows; ranks far from the ends of the model lead by less
    blocks = [Block(PERIOD * (r - 2 * p + 1), 3 - PERIOD * p, 4 - PERIOD * (p - r), 1) for r in range(p)]
    return _table(blocks, num_microbatches, 2 * p)


def v_half(num_ranks: int, num_microbatches: int) -> Table:
    """V-Half: about half the peak activations of 1F1B, ``(p + 2) // 2``, and half its bubble (arXiv 2405.15362)."""
    p, gap = num_ranks, 0 if num_ranks % 2 else 3  # the gap keeps two actions out of one slot
    blocks = [Block(2 * r, 3 * p - 2 - r, 3 * p + gap + 2 * r - 1, 6 * p + gap - 2 - r) for r in range(p)]
    return _table(blocks, num_microbatches, 2 * ((p + 2) // 2))


def v_min(num_ranks: int, num_microbatches: int) -> Table:
    """V-Min: about a third of 1F1B's peak activations, ``(p + 4) // 3``; two thirds of its bubble (the same paper)."""
    p, gap = num_ranks, 0 if num_ranks % 3 else 2
    blocks = [Block(r, 2 * p - 1 - r, 2 * p + gap + r, 4 * p + gap - 1 - r) for r in range(p)]
    return _table(blocks, num_microbatches, 2 * ((p + 4) // 3))


def _table(blocks: list[Block], num_microbatches: int, limit: int) -> Table:
    """The shorter of two runs: with actions moved into idle slots, and strictly in the order of the blocks."""
    require_positive(len(blocks), num_microbatches)
    runs = [_Run(blocks, num_microbatches, limit, early) for early in (True, False)]
    slots = [run.fill() for run in runs]
    return Table(v_placement(len(blocks)), with_reductions(runs[slots.index(min(slots))].rows))


class _Run:
    """A run of all ranks in slots of equal length, each rank doing the first of these that it can:

    the next action in the order of its blocks; the oldest weight gradient; with ``early``, an action from further down
    the order, provided that everything before it still fits into the memory. ``limit``: stages times microbatches whose
    activations a rank may hold.
    """

    def __init__(self, blocks: list[Block], num_microbatches: int, limit: int, early: bool) -> None:
        self.rows: list[Row] = [[] for _ in blocks]
        self._limit, self._early = limit, early
        self._last_stage = 2 * len(blocks) - 1
        self._todo = [
            _in_order(rank, self._last_stage - rank, block, num_microbatches) for rank, block in enumerate(blocks)
        ]
        self._weights: list[list[Action]] = [[] for _ in blocks]  # had their I, but not yet their W
        self._on_their_way = [0 for _ in blocks]  # had their F, but not yet their I
        self._done: set[Action] = set()  # in earlier slots

    def fill(self) -> int:
        """Run to the end; the number of slots."""
        slots = 0
        while any(self._todo) or any(self._weights):
            self._done.update([action for rank in range(len(self.rows)) if (action := self._act(rank)) is not None])
            slots += 1
        return slots

    def _act(self, rank: int) -> Action | None:
        todo, weights = self._todo[rank], self._weights[rank]
        action = todo.pop(0) if todo and self._can(rank, todo[0]) else None
        if action is None and weights:
            action = weights.pop(0)
        elif action is None and self._early:
            action = self._take_early(rank)
        if action is None:
            return None
        if action.kind is Kind.F:
            self._on_their_way[rank] += 1
        elif action.kind is Kind.I:
            self._on_their_way[rank] -= 1
            weights.append(action._replace(kind=Kind.W))
        self.rows[rank].append(action)
        return action

    def _can(self, rank: int, action: Action) -> bool:
        kind, stage, microbatch = action
        if kind is Kind.F:
            fits = self._on_their_way[rank] + len(self._weights[rank]) < self._limit
            return fits and (stage == 0 or Action(Kind.F, stage - 1, microbatch) in self._done)
        if stage == self._last_stage:
            return Action(Kind.F, stage, microbatch) in self._done
        return Action(Kind.I, stage + 1, microbatch) in self._done

    def _take_early(self, rank: int) -> Action | None:
        held = peak = self._on_their_way[rank]
        seen = set()
        for position, action in enumerate(self._todo[rank]):
            way = action[:2]
            if way not in seen:
                seen.add(way)
                if self._can(rank, action) and (action.kind is Kind.I or peak < self._limit):
                    return self._todo[rank].pop(position)
                if len(seen) == len(Block._fields):
                    return None
            held += 1 if action.kind is Kind.F else -1
            peak = max(peak, held)
        return None


def _in_order(down: int, up: int, block: Block, num_microbatches: int) -> list[Action]:
    ways = [(Kind.F, down), (Kind.F, up), (Kind.I, up), (Kind.I, down)]
    slots = [
        (start + PERIOD * m, Action(kind, stage, m))
        for start, (kind, stage) in zip(block, ways, strict=True)
        for m in range(num_microbatches)
    ]
    return [action for _, action in sorted(slots)]
