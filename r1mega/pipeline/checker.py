"""Proves a table complete, in order and free of deadlock, and counts its peak activations."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from r1mega.pipeline.actions import Action, Kind, ScheduleError, Table
from r1mega.pipeline.transfers import Message, Program, programs

__all__ = ["Report", "ScheduleError", "check", "check_transfers"]


@dataclass
class Report:
    """What the checker found out.

    Args:
        peak_activations: for each rank the largest number of (stage, microbatch) pairs whose activations it holds at
            once, counted from the F to the B, or to the W where the backward is split.
    """

    peak_activations: list[int]


def check(table: Table) -> Report:
    """Check everything that can be known before a run. Raises ScheduleError naming rank, action and reason."""
    _check_placement(table)
    _check_complete(table)
    _check_order(table)
    check_transfers(programs(table))
    return Report([_peak_activations(row) for row in table.rows])


def _check_placement(table: Table) -> None:
    for stage, rank in enumerate(table.stage_to_rank):
        if not 0 <= rank < table.num_ranks:
            raise ScheduleError(rank, None, f"holds stage {stage}, but the table has {table.num_ranks} rows")
    for rank, row in enumerate(table.rows):
        if rank not in table.stage_to_rank:
            raise ScheduleError(rank, None, "holds no stage")
        for action in row:
            if not 0 <= action.stage < table.num_stages:
                raise ScheduleError(rank, action, f"there are {table.num_stages} stages only")
            owner = table.stage_to_rank[action.stage]
            if owner != rank:
                raise ScheduleError(rank, action, f"stage {action.stage} is on rank {owner}")
            if (action.microbatch < 0) != (action.kind is Kind.R):
                raise ScheduleError(rank, action, "every action but R has a microbatch, and R has none")


def _check_complete(table: Table) -> None:
    """Every F, every B or else I and W, and every R, exactly once."""
    if table.num_microbatches == 0:
        raise ScheduleError(0, None, "there is no microbatch")
    for rank, row in enumerate(table.rows):
        found: set[Action] = set()
        for action in row:
            if action in found:
                raise ScheduleError(rank, action, "comes twice")
            found.add(action)
        for stage in table.stages_of(rank):
            for microbatch in range(table.num_microbatches):
                _check_microbatch(rank, found, stage, microbatch)
            _require(rank, found, Action(Kind.R, stage))


def _check_microbatch(rank: int, found: set[Action], stage: int, microbatch: int) -> None:
    split = [Action(kind, stage, microbatch) for kind in (Kind.I, Kind.W)]
    full = Action(Kind.B, stage, microbatch)
    _require(rank, found, Action(Kind.F, stage, microbatch))
    if full in found:
        for action in split:
            if action in found:
                raise ScheduleError(rank, action, f"{full} does the same work already")
    elif not found.isdisjoint(split):
        for action in split:
            _require(rank, found, action)
    else:
        _require(rank, found, full)


def _require(rank: int, found: set[Action], action: Action) -> None:
    if action not in found:
        raise ScheduleError(rank, action, "is missing")


def _check_order(table: Table) -> None:
    """F before B or I, I before W, R after everything of its stage."""
    for rank, row in enumerate(table.rows):
        done: set[Action] = set()
        for action in row:
            if Action(Kind.R, action.stage) in done:
                raise ScheduleError(rank, action, f"comes after {Action(Kind.R, action.stage)}")
            before = {Kind.B: Kind.F, Kind.I: Kind.F, Kind.W: Kind.I}.get(action.kind)
            if before is not None and action._replace(kind=before) not in done:
                raise ScheduleError(rank, action, f"comes before {action._replace(kind=before)}")
            done.add(action)


def check_transfers(ranks: list[Program]) -> None:
    """Run the programs without tensors: every message must find its receiver, in the same order at both ends.

    Sends are asynchronous (a rank goes on) and rendezvous (nothing stores a message on its way: it passes when the
    receiver takes it, after those sent before it from the same rank to the same rank). Whether a rank can go on then
    never depends on timing, so one order of execution proves it for all. Raises ScheduleError.
    """
    sent: dict[tuple[int, int], deque[Message]] = {
        (source, program.rank): deque() for program in ranks for source in program.incoming
    }
    expected = {(src, program.rank): deque(queue) for program in ranks for src, queue in program.incoming.items()}
    kept: list[set[Message]] = [set() for _ in ranks]
    position = [0] * len(ranks)

    def advance(program: Program) -> bool:
        start = position[program.rank]
        for step in program.steps[start:]:
            if step.takes is not None and not _take(step.takes, kept[program.rank], sent, expected):
                break
            if step.gives is not None and step.gives.source == step.gives.destination:
                kept[program.rank].add(step.gives)
            elif step.gives is not None:
                sent.setdefault((step.gives.source, step.gives.destination), deque()).append(step.gives)
            position[program.rank] += 1
        return position[program.rank] > start

    while any([advance(program) for program in ranks]):
        pass
    blocked = [program for program in ranks if position[program.rank] < len(program.steps)]
    if blocked:
        steps = [program.steps[position[program.rank]] for program in blocked]
        waits = [(program.rank, s.action, s.takes) for program, s in zip(blocked, steps, strict=True) if s.takes]
        story = "; ".join(
            f"rank {r} waits in {action} for {wanted} on rank {wanted.source}" for r, action, wanted in waits
        )
        raise ScheduleError(waits[0][0], waits[0][1], f"deadlock: {story}")
    for (source, destination), queue in sent.items():
        if queue:
            raise ScheduleError(source, None, f"sends {queue[0]} to rank {destination}, which never takes it")


def _take(
    message: Message,
    kept: set[Message],
    sent: dict[tuple[int, int], deque[Message]],
    expected: dict[tuple[int, int], deque[Message]],
) -> bool:
    """Whether ``message`` can be had; takes what its source sent before it, too."""
    pair = (message.source, message.destination)
    queue = sent.get(pair, ())
    while message not in kept and queue:
        first, want = queue.popleft(), expected[pair].popleft() if expected[pair] else None
        if first != want:
            raise ScheduleError(message.destination, None, f"expects {want} where rank {message.source} sends {first}")
        kept.add(first)
    found = message in kept
    kept.discard(message)
    return found


def _peak_activations(row: list[Action]) -> int:
    held = peak = 0
    for action in row:
        held += {Kind.F: 1, Kind.B: -1, Kind.W: -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak
