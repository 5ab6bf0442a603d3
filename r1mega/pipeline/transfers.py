"""Derives from a table what every rank receives and sends: the one source that checker and executor share.

Messages from one rank to another keep one order, the sender's. A receiver that needs a message takes those before it
first and keeps them, so that both ends agree on the order whatever the order in which the receiver uses them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from r1mega.pipeline.actions import Action, Kind, Table


class Message(NamedTuple):
    """Tensors that one action hands to another: activations (kind F) or their gradients (kind B).

    ``stage`` is the stage that made them. With ``source == destination`` they never leave the rank.
    """

    kind: Kind
    stage: int
    microbatch: int
    source: int
    destination: int

    def __str__(self) -> str:
        what = "activations" if self.kind is Kind.F else "gradients"
        return f"the {what} from stage {self.stage}, microbatch {self.microbatch}"


class Step(NamedTuple):
    """An action with what it takes and what it gives; None for a first or last stage, and for W and R.

    ``acknowledged``: when ``takes`` is there, so many of this rank's messages to its sender have surely been received.
    """

    action: Action
    takes: Message | None
    gives: Message | None
    acknowledged: int = 0


@dataclass
class Program:
    """What one rank does: its steps, and for each other rank the messages from there, in the order of their coming."""

    rank: int
    steps: list[Step]
    incoming: dict[int, list[Message]]


def programs(table: Table, forward_only: bool = False) -> list[Program]:
    """The program of each rank. The table must be complete (see :mod:`r1mega.pipeline.checker`)."""
    rows = [[a for a in row if a.kind is Kind.F or not forward_only] for row in table.rows]
    steps = [[Step(action, _takes(action, table), _gives(action, table)) for action in row] for row in rows]
    incoming: list[dict[int, list[Message]]] = [{} for _ in rows]
    for row in steps:
        for step in row:
            if step.gives is not None and step.gives.source != step.gives.destination:
                incoming[step.gives.destination].setdefault(step.gives.source, []).append(step.gives)
    acknowledged = _acknowledgements(steps, incoming)
    return [
        Program(rank, [step._replace(acknowledged=acknowledged.get(step.takes, 0)) for step in row], incoming[rank])
        for rank, row in enumerate(steps)
    ]


def _takes(action: Action, table: Table) -> Message | None:
    if action.kind is Kind.F and action.stage > 0:
        return _message(Kind.F, action.stage - 1, action.stage, action.microbatch, table)
    if action.kind in (Kind.B, Kind.I) and action.stage + 1 < table.num_stages:
        return _message(Kind.B, action.stage + 1, action.stage, action.microbatch, table)
    return None


def _gives(action: Action, table: Table) -> Message | None:
    if action.kind is Kind.F and action.stage + 1 < table.num_stages:
        return _message(Kind.F, action.stage, action.stage + 1, action.microbatch, table)
    if action.kind in (Kind.B, Kind.I) and action.stage > 0:
        return _message(Kind.B, action.stage, action.stage - 1, action.microbatch, table)
    return None


def _message(kind: Kind, stage: int, to_stage: int, microbatch: int, table: Table) -> Message:
    return Message(kind, stage, microbatch, table.stage_to_rank[stage], table.stage_to_rank[to_stage])


def _acknowledgements(steps: list[list[Step]], incoming: list[dict[int, list[Message]]]) -> dict[Message | None, int]:
    """For each message: how many messages from its destination its source had received when it sent this one."""
    number = {message: i for queues in incoming for queue in queues.values() for i, message in enumerate(queue, 1)}
    acknowledged: dict[Message | None, int] = {}
    for row in steps:
        received: dict[int, int] = defaultdict(int)
        for step in row:
            if step.takes in number:
                received[step.takes.source] = max(received[step.takes.source], number[step.takes])
            if step.gives in number:
                acknowledged[step.gives] = received[step.gives.destination]
    return acknowledged
