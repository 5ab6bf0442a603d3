"""The words of a schedule: an action, and the table that says which rank runs which actions in which order."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does."""

    F = "F"  # forward
    B = "B"  # full backward: I and W at once
    I = "I"  # noqa: E741  backward, gradients of the input only
    W = "W"  # gradients of the weights, of a microbatch that had its I
    C = "C"  # compute the forward again, of a microbatch whose F kept its inputs only (activation checkpointing)
    R = "R"  # reduce the gradients of a stage over its data-parallel ranks
    O = "O"  # noqa: E741  optimizer step of a stage


PER_STEP = (Kind.R, Kind.O)  # once a step and stage; all others once a microbatch, too


class Action(NamedTuple):
    """One thing that a rank does; prints as ``2F0``: stage 2, forward, microbatch 0. R and O have none (-1): ``2R``."""

    kind: Kind
    stage: int
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.kind in PER_STEP else self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as ``text``. Raises ValueError."""
        match = re.fullmatch(r"(\d+)(?:([FBIWC])(\d+)|([RO]))", text, re.ASCII)
        if match is None:
            raise ValueError(
                f"{text!r} is not an action; 2F0, 2B0, 2I0, 2W0, 2C0 (stage 2, microbatch 0), 2R, 2O or (2F1;2B0)"
            )
        stage, kind, microbatch, per_step = match.groups()
        return cls(Kind(per_step), int(stage)) if kind is None else cls(Kind(kind), int(stage), int(microbatch))


class Overlap(NamedTuple):
    """A forward and a backward that a rank runs at the same time; prints as ``(2F1;2B0)``.

    Both take what they need before either begins, and hand on their results when both have ended.
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})"


def parse_cell(text: str) -> Action | Overlap:
    """The action or overlap that prints as ``text``. Raises ValueError."""
    match = re.fullmatch(r"\(([^;]*);([^;]*)\)", text)
    if match is None:
        return Action.parse(text)
    forward, backward = (Action.parse(part.strip()) for part in match.groups())
    if forward.kind is not Kind.F or backward.kind not in (Kind.B, Kind.I):
        raise ValueError(f"{text!r} does not overlap a forward with a backward, as in (2F1;2B0)")
    return Overlap(forward, backward)


class ScheduleError(ValueError):
    """A table that cannot run. Names the rank, the action (None where it concerns the whole row) and the reason."""

    def __init__(self, rank: int, action: Action | None, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}" if action is None else f"rank {rank}, action {action}: {reason}")
        self.rank, self.action, self.reason = rank, action, reason


@dataclass
class Table:
    """A schedule.

    Args:
        stage_to_rank: the rank that holds each stage. Within a copy of the model activations flow from its first stage
            to its last.
        rows: for each rank what it does, in order.
        num_copies: copies of the model's stages. With 2 (DualPipe) the first half of the stages is one copy, the second
            half another; stage ``s`` and stage ``s + stages_per_copy`` have the same weights. The microbatches are
            dealt out to the copies in consecutive equal parts.
    """

    stage_to_rank: list[int]
    rows: list[list[Action | Overlap]]
    num_copies: int = 1

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    @property
    def num_stages(self) -> int:
        """Of all copies together."""
        return len(self.stage_to_rank)

    @property
    def stages_per_copy(self) -> int:
        return len(self.stage_to_rank) // self.num_copies

    @property
    def num_microbatches(self) -> int:
        """One more than the highest microbatch of any action; 0 for an empty table."""
        return 1 + max(
            (action.microbatch for rank in range(self.num_ranks) for action in self.actions(rank)), default=-1
        )

    def actions(self, rank: int) -> Iterator[Action]:
        """What ``rank`` does one by one; an overlap is its forward, then its backward."""
        for cell in self.rows[rank]:
            if isinstance(cell, Overlap):
                yield from cell
            else:
                yield cell

    def stages_of(self, rank: int) -> list[int]:
        """The stages that ``rank`` holds."""
        return [stage for stage, owner in enumerate(self.stage_to_rank) if owner == rank]

    def previous_stage(self, stage: int) -> int | None:
        """Where the activations of ``stage`` come from; None for the first stage of a copy."""
        return stage - 1 if stage % self.stages_per_copy else None

    def next_stage(self, stage: int) -> int | None:
        """Where the activations of ``stage`` go to; None for the last stage of a copy."""
        return stage + 1 if (stage + 1) % self.stages_per_copy else None

    def microbatches_of(self, stage: int) -> list[int]:
        """The microbatches that run through ``stage``."""
        count, copy = self.num_microbatches, stage // self.stages_per_copy
        return [m for m in range(count) if m * self.num_copies // count == copy]

    def to_csv(self) -> str:
        """One line a rank, one cell an action."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([str(cell) for cell in row] for row in self.rows)
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> Table:
        """Read what :meth:`to_csv` writes. Empty cells (idle time) are skipped; a stage is on the rank that runs it.

        The stages through which microbatch 0 runs are one copy of the model. Raises ScheduleError for a cell that is
        not an action, a stage on two ranks, a missing stage number and stages that do not make up whole copies.
        """
        rows: list[list[Action | Overlap]] = []
        for rank, cells in enumerate(csv.reader(io.StringIO(text))):
            try:
                rows.append([parse_cell(cell.strip()) for cell in cells if cell.strip()])
            except ValueError as error:
                raise ScheduleError(rank, None, str(error)) from None
        table = cls([], rows)
        table.stage_to_rank = _owners(table)
        forwards = {a.stage for rank in range(len(rows)) for a in table.actions(rank) if a[::2] == (Kind.F, 0)}
        if forwards and table.num_stages % len(forwards):
            raise ScheduleError(
                0,
                None,
                f"microbatch 0 runs through {len(forwards)} of {table.num_stages} stages, which is no whole copy",
            )
        table.num_copies = table.num_stages // len(forwards) if forwards else 1
        return table

    def __str__(self) -> str:
        width = max((len(str(cell)) for row in self.rows for cell in row), default=0)
        lines = (" ".join(str(cell).ljust(width) for cell in row).rstrip() for row in self.rows)
        return "\n".join(f"rank {rank}: {line}" for rank, line in enumerate(lines))


def _owners(table: Table) -> list[int]:
    owner: dict[int, int] = {}
    for rank in range(table.num_ranks):
        for action in table.actions(rank):
            if owner.setdefault(action.stage, rank) != rank:
                raise ScheduleError(rank, action, f"stage {action.stage} runs on rank {owner[action.stage]} already")
    for stage in range(len(owner)):
        if stage not in owner:
            reason = f"no rank runs stage {stage}, but there is a stage {max(owner)}; is a line missing?"
            raise ScheduleError(0, None, reason)
    return [owner[stage] for stage in range(len(owner))]
