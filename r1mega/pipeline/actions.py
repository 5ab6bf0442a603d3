"""The words of a schedule: an action, and the table that says which rank runs which actions in which order."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does."""

    F = "F"  # forward
    B = "B"  # full backward: I and W at once
    I = "I"  # noqa: E741  backward, gradients of the input only
    W = "W"  # gradients of the weights, of a microbatch that had its I
    R = "R"  # reduce the gradients of a stage over its data-parallel ranks


class Action(NamedTuple):
    """One thing that a rank does; prints as ``2F0``: stage 2, forward, microbatch 0. R has none (-1): ``2R``."""

    kind: Kind
    stage: int
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.kind is Kind.R else self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as ``text``. Raises ValueError."""
        match = re.fullmatch(r"(\d+)(?:([FBIW])(\d+)|R)", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text!r} is not an action; 2F0, 2B0, 2I0, 2W0 (stage 2, microbatch 0) or 2R")
        stage, kind, microbatch = match.groups()
        return cls(Kind.R, int(stage)) if kind is None else cls(Kind(kind), int(stage), int(microbatch))


class ScheduleError(ValueError):
    """A table that cannot run. Names the rank, the action (None where it concerns the whole row) and the reason."""

    def __init__(self, rank: int, action: Action | None, reason: str) -> None:
        super().__init__(f"rank {rank}: {reason}" if action is None else f"rank {rank}, action {action}: {reason}")
        self.rank, self.action, self.reason = rank, action, reason


@dataclass
class Table:
    """A schedule.

    Args:
        stage_to_rank: the rank that holds each stage; activations flow from stage 0 to the last.
        rows: for each rank its actions, in the order in which it runs them.
    """

    stage_to_rank: list[int]
    rows: list[list[Action]]

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    @property
    def num_stages(self) -> int:
        return len(self.stage_to_rank)

    @property
    def num_microbatches(self) -> int:
        """One more than the highest microbatch of any action; 0 for an empty table."""
        return 1 + max((action.microbatch for row in self.rows for action in row), default=-1)

    def stages_of(self, rank: int) -> list[int]:
        """The stages that ``rank`` holds."""
        return [stage for stage, owner in enumerate(self.stage_to_rank) if owner == rank]

    def to_csv(self) -> str:
        """One line a rank, one cell an action."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([str(action) for action in row] for row in self.rows)
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str) -> Table:
        """Read what :meth:`to_csv` writes. Empty cells (idle time) are skipped; a stage is on the rank that runs it.

        Raises ScheduleError for a cell that is not an action, a stage on two ranks and a missing stage number.
        """
        rows = []
        for rank, cells in enumerate(csv.reader(io.StringIO(text))):
            try:
                rows.append([Action.parse(cell.strip()) for cell in cells if cell.strip()])
            except ValueError as error:
                raise ScheduleError(rank, None, str(error)) from None
        return cls(_owners(rows), rows)

    def __str__(self) -> str:
        width = max((len(str(action)) for row in self.rows for action in row), default=0)
        lines = (" ".join(str(action).ljust(width) for action in row).rstrip() for row in self.rows)
        return "\n".join(f"rank {rank}: {line}" for rank, line in enumerate(lines))


def _owners(rows: list[list[Action]]) -> list[int]:
    owner: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for action in row:
            if owner.setdefault(action.stage, rank) != rank:
                raise ScheduleError(rank, action, f"stage {action.stage} runs on rank {owner[action.stage]} already")
    for stage in range(len(owner)):
        if stage not in owner:
            raise ScheduleError(0, None, f"no rank runs stage {stage}, but there is a stage {max(owner)}")
    return [owner[stage] for stage in range(len(owner))]
