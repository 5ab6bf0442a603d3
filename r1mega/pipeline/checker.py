"""Proves a table complete, in order and free of deadlock, and counts its peak activations."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from r1mega.pipeline.actions import PER_STEP, Action, Kind, Overlap, ScheduleError, Table
from r1mega.pipeline.transfers import Message, Program, programs

__all__ = ["Report", "ScheduleError", "check", "check_transfers"]

BEFORE: dict[Kind, tuple[Kind, ...]] = {
    Kind.F: (), Kind.C: (Kind.F,), Kind.B: (Kind.F, Kind.C), Kind.I: (Kind.F, Kind.C), Kind.W: (Kind.I,),
    Kind.R: (), Kind.O: (Kind.R,),
}  # fmt: skip


@dataclass
class Report:
    """What the checker found out.

    Args:
        peak_activations: for each rank the largest number of (stage, microbatch) pairs whose activations it holds at
            once, counted from the F (the C where there is one) to the B, or to the W where the backward is split.
    """

    peak_activations: list[int]


def check(table: Table) -> Report:
    """Check everything that can be known before a run. Raises ScheduleError naming rank, action and reason."""
    _check_placement(table)
    _check_complete(table)
    _check_order(table)
    check_transfers(programs(table))
    return Report([_peak_activations(list(table.actions(rank))) for rank in range(table.num_ranks)])


def _check_placement(table: Table) -> None:
    if table.num_copies < 1 or table.num_stages % table.num_copies:
        raise ScheduleError(0, None, f"{table.num_stages} stages do not make {table.num_copies} equal copies")
    for stage, rank in enumerate(table.stage_to_rank):
        if not 0 <= rank < table.num_ranks:
            raise ScheduleError(rank, None, f"holds stage {stage}, but the table has {table.num_ranks} rows")
    for rank in range(table.num_ranks):
        if rank not in table.stage_to_rank:
            raise ScheduleError(rank, None, "holds no stage")
        for action in table.actions(rank):
            if not 0 <= action.stage < table.num_stages:
                raise ScheduleError(rank, action, f"there are {table.num_stages} stages only")
            owner = table.stage_to_rank[action.stage]
            if owner != rank:
                raise ScheduleError(rank, action, f"stage {action.stage} is on rank {owner}")
            if (action.microbatch < 0) != (action.kind in PER_STEP):
                raise ScheduleError(rank, action, "every action but R and O has a microbatch, and these have none")


def _check_complete(table: Table) -> None:
    """Every F, every B or else I and W, and every R, exactly once."""
    if table.num_microbatches == 0:
        raise ScheduleError(0, None, "there is no microbatch")
    num_actions = sum(1 for rank in range(table.num_ranks) for _ in table.actions(rank))
    if table.num_microbatches > num_actions:  # before anything is made for each of them
        highest = table.num_microbatches - 1
        raise ScheduleError(0, None, f"there is a microbatch {highest}, but there are {num_actions} actions only")
    of_copy = [set(table.microbatches_of(copy * table.stages_per_copy)) for copy in range(table.num_copies)]
    everywhere = [of_copy[stage // table.stages_per_copy] for stage in range(table.num_stages)]
    for rank in range(table.num_ranks):
        found: set[Action] = set()
        for action in table.actions(rank):
            if action in found:
                raise ScheduleError(rank, action, "comes twice")
            if action.kind not in PER_STEP and action.microbatch not in everywhere[action.stage]:
                raise ScheduleError(
                    rank, action, f"microbatch {action.microbatch} belongs to another copy of the model"
                )
            found.add(action)
        for stage in table.stages_of(rank):
            for microbatch in sorted(everywhere[stage]):
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
    """F before C before B or I, I before W, R after everything of its stage but the O; no B inside its own F."""
    for rank in range(table.num_ranks):
        for cell in table.rows[rank]:
            if isinstance(cell, Overlap) and cell.forward[1:] == cell.backward[1:]:
                raise ScheduleError(rank, cell.backward, f"overlaps its own forward, {cell.forward}")
        present = set(table.actions(rank))
        done: set[Action] = set()
        reduced: set[int] = set()
        for action in table.actions(rank):
            kind, stage, microbatch = action
            if stage in reduced and kind is not Kind.O:
                raise ScheduleError(rank, action, f"comes after {Action(Kind.R, stage)}")
            for kind_before in BEFORE[kind]:
                before = Action(kind_before, stage, microbatch)
                if before not in done and (before in present or kind_before is not Kind.C):
                    raise ScheduleError(rank, action, f"comes before {before}")
            done.add(action)
            if kind is Kind.R:
                reduced.add(stage)


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
    kept: list[set[Message | None]] = [set() for _ in ranks]
    position = [0] * len(ranks)

    def advance(program: Program) -> bool:
        start = position[program.rank]
        for together in program.steps[start:]:
            # an overlap that cannot have everything yet keeps what is there: taking twice is harmless
            if not all([_has(step.takes, kept[program.rank], sent, expected) for step in together]):
                break
            kept[program.rank].difference_update(step.takes for step in together)
            for gives in (step.gives for step in together):
                if gives is not None and gives.source == gives.destination:
                    kept[program.rank].add(gives)
                elif gives is not None:
                    sent.setdefault((gives.source, gives.destination), deque()).append(gives)
            position[program.rank] += 1
        return position[program.rank] > start

    while any([advance(program) for program in ranks]):
        pass
    blocked = [program for program in ranks if position[program.rank] < len(program.steps)]
    if blocked:
        waits = [
            (program.rank, step.action, step.takes)
            for program in blocked
            for step in program.steps[position[program.rank]]
            if step.takes is not None and step.takes not in kept[program.rank]
        ]
        story = "; ".join(
            f"rank {r} waits in {action} for {wanted} on rank {wanted.source}" for r, action, wanted in waits
        )
        raise ScheduleError(waits[0][0], waits[0][1], f"deadlock: {story}")
    for (source, destination), queue in sent.items():
        if queue:
            raise ScheduleError(source, None, f"sends {queue[0]} to rank {destination}, which never takes it")


def _has(
    message: Message | None,
    kept: set[Message | None],
    sent: dict[tuple[int, int], deque[Message]],
    expected: dict[tuple[int, int], deque[Message]],
) -> bool:
    """Whether ``message`` is among ``kept``; first adds to ``kept`` what its source sent up to it."""
    if message is None:
        return True
    pair = (message.source, message.destination)
    queue = sent.get(pair, ())
    while message not in kept and queue:
        first, want = queue.popleft(), expected[pair].popleft() if expected[pair] else None
        if first != want:
            raise ScheduleError(message.destination, None, f"expects {want} where rank {message.source} sends {first}")
        kept.add(first)
    return message in kept


def _peak_activations(row: list[Action]) -> int:
    recomputed = {action[1:] for action in row if action.kind is Kind.C}
    held = peak = 0
    for action in row:
        kind = action.kind
        if kind is Kind.C or (kind is Kind.F and action[1:] not in recomputed):
            held += 1
            peak = max(peak, held)
        elif kind is Kind.B or kind is Kind.W:
            held -= 1
    return peak
