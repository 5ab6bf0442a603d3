"""Derives from a table what every rank receives and sends: the one source that checker and executor share.

Messages from one rank to another keep one order, the sender's. A receiver that needs a message takes those before it
first and keeps them, so that both ends agree on the order whatever the order in which the receiver uses them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from r1mega.pipeline.actions import Action, Kind, Overlap, Table

Link = tuple[Kind, int, int, int]  # a message of any microbatch: its kind, stage, source and destination


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
    """An action with what it takes and what it gives; None for a first or last stage, and for all but F, B and I.

    ``acknowledged``: when ``takes`` is there, so many of this rank's messages to its sender have surely been received.
    """

    action: Action
    takes: Message | None
    gives: Message | None
    acknowledged: int = 0


@dataclass
class Program:
    """What one rank does: its steps, and for each other rank the messages from there, in the order of their coming.

    Steps that belong together (an overlap) are a tuple: all of them take before any of them gives.
    """

    rank: int
    steps: list[tuple[Step, ...]]
    incoming: dict[int, list[Message]]


def programs(table: Table, forward_only: bool = False) -> list[Program]:
    """The program of each rank. The table must be complete (see :mod:`r1mega.pipeline.checker`)."""
    links = _links(table)
    steps = [
        [tuple([_step(action, links) for action in cell]) for cell in row]
        for row in (_cells(row, forward_only) for row in table.rows)
    ]
    incoming: list[dict[int, list[Message]]] = [{} for _ in steps]
    for row in steps:
        for step in chain.from_iterable(row):
            if step.gives is not None and step.gives.source != step.gives.destination:
                incoming[step.gives.destination].setdefault(step.gives.source, []).append(step.gives)
    acknowledged = _acknowledgements(steps, incoming)
    for row in steps:
        row[:] = [tuple([Step(*s[:3], acknowledged.get(s.takes, 0)) for s in together]) for together in row]
    return [Program(rank, row, incoming[rank]) for rank, row in enumerate(steps)]


def _cells(row: list[Action | Overlap], forward_only: bool) -> Iterator[tuple[Action, ...]]:
    for cell in row:
        actions = tuple(cell) if isinstance(cell, Overlap) else (cell,)
        if forward_only:
            actions = tuple(action for action in actions if action.kind is Kind.F)
        if actions:
            yield actions


def _links(table: Table) -> dict[tuple[Kind, int], tuple[Link | None, Link | None]]:
    """For F, B and I of each stage: what they take and what they give."""
    links: dict[tuple[Kind, int], tuple[Link | None, Link | None]] = {}
    rank = table.stage_to_rank
    for stage in range(table.num_stages):
        before, after = table.previous_stage(stage), table.next_stage(stage)
        links[Kind.F, stage] = (
            None if before is None else (Kind.F, before, rank[before], rank[stage]),
            None if after is None else (Kind.F, stage, rank[stage], rank[after]),
        )
        links[Kind.B, stage] = links[Kind.I, stage] = (
            None if after is None else (Kind.B, after, rank[after], rank[stage]),
            None if before is None else (Kind.B, stage, rank[stage], rank[before]),
        )
    return links


def _step(action: Action, links: dict[tuple[Kind, int], tuple[Link | None, Link | None]]) -> Step:
    takes, gives = links.get(action[:2], (None, None))
    return Step(action, _message(takes, action.microbatch), _message(gives, action.microbatch))


def _message(link: Link | None, microbatch: int) -> Message | None:
    if link is None:
        return None
    kind, stage, source, destination = link
    return Message(kind, stage, microbatch, source, destination)


def _acknowledgements(
    steps: list[list[tuple[Step, ...]]], incoming: list[dict[int, list[Message]]]
) -> dict[Message | None, int]:
    """For each message: how many messages from its destination its source had received when it sent this one."""
    number = {message: i for queues in incoming for queue in queues.values() for i, message in enumerate(queue, 1)}
    acknowledged: dict[Message | None, int] = {}
    for row in steps:
        received: dict[int, int] = defaultdict(int)
        for together in row:
            for step in together:
                if step.takes in number:
                    received[step.takes.source] = max(received[step.takes.source], number[step.takes])
            for step in together:
                if step.gives in number:
                    acknowledged[step.gives] = received[step.gives.destination]
    return acknowledged
