"""What the generators share: placements, notation, reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from r1mega.pipeline.actions import Action, Kind, Overlap

Row = list[Action | Overlap]


def looped_placement(num_ranks: int, chunks: int) -> list[int]:
    """Stage to rank where stages go round the ranks ``chunks`` times: stage ``s`` is on rank ``s % num_ranks``."""
    return [stage % num_ranks for stage in range(num_ranks * chunks)]


def v_placement(num_ranks: int) -> list[int]:
    """Stage to rank where two stages a rank make a V: rank ``r`` holds stages ``r`` and ``2 * num_ranks - 1 - r``."""
    return [*range(num_ranks), *reversed(range(num_ranks))]


def with_reductions(rows: Sequence[Sequence[Action | Overlap]]) -> list[Row]:
    """Copy ``rows`` with an R for each stage, right after the last action of that stage."""
    return [_with_reductions(row) for row in rows]


def _with_reductions(row: Sequence[Action | Overlap]) -> Row:
    cells = [(cell, cell if isinstance(cell, Overlap) else (cell,)) for cell in row]
    last = {action.stage: position for position, (_, actions) in enumerate(cells) for action in actions}
    reduced: Row = []
    for position, (cell, actions) in enumerate(cells):
        reduced.append(cell)
        stages = dict.fromkeys(action.stage for action in actions)
        reduced += [Action(Kind.R, stage) for stage in stages if last[stage] == position]
    return reduced


def renumbered(rows: Sequence[Sequence[Action | Overlap]], number: Callable[[Action], int | None]) -> list[Row]:
    """Copy ``rows`` with the microbatch of each action replaced by ``number(action)``; None leaves the action out.

    Microbatches do not depend on each other, so a table free of deadlock stays so without some of them: this is how a
    generator that counts in whole groups of microbatches makes a table for any number.
    """
    return [[kept for cell in row if (kept := _renumbered(cell, number)) is not None] for row in rows]


def _renumbered(cell: Action | Overlap, number: Callable[[Action], int | None]) -> Action | Overlap | None:
    if isinstance(cell, Action):
        microbatch = number(cell)
        return None if microbatch is None else cell._replace(microbatch=microbatch)
    forward, backward = (_renumbered(action, number) for action in cell)
    if isinstance(forward, Action) and isinstance(backward, Action):
        return Overlap(forward, backward)
    return forward if backward is None else backward


def require_positive(num_ranks: int, num_microbatches: int, chunks: int = 1) -> None:
    """Raise ValueError unless there is at least one of each."""
    for number, what in ((num_ranks, "a rank"), (num_microbatches, "a microbatch"), (chunks, "a stage on each rank")):
        if number < 1:
            raise ValueError(f"a schedule needs {what} at least, not {number}")
