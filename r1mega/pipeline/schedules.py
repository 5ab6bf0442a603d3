"""Generators of schedule tables. Each one is a function of (ranks, microbatches) and knows nothing of tensors.

Every generator runs the backwards of a stage in the order of the microbatches, so that gradients are added up in the
same order whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from r1mega.pipeline.actions import Action, Kind, Overlap, Table


def gpipe(num_ranks: int, num_microbatches: int) -> Table:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965). Peak activations: every microbatch."""
    _require_positive(num_ranks, num_microbatches)
    microbatches = range(num_microbatches)
    rows = [
        [Action(Kind.F, rank, m) for m in microbatches] + [Action(Kind.B, rank, m) for m in microbatches]
        for rank in range(num_ranks)
    ]
    return Table(list(range(num_ranks)), with_reductions(rows))


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Table:
    """Forwards until the pipeline is full, then one forward, one backward (PipeDream-flush, arXiv 2006.09503).

    Peak activations: ``min(num_ranks - rank, num_microbatches)``.
    """
    _require_positive(num_ranks, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        warm_up = min(num_ranks - rank - 1, num_microbatches)
        row = [Action(Kind.F, rank, m) for m in range(warm_up)]
        for m in range(warm_up, num_microbatches):
            row += [Action(Kind.F, rank, m), Action(Kind.B, rank, m - warm_up)]
        row += [Action(Kind.B, rank, m) for m in range(num_microbatches - warm_up, num_microbatches)]
        rows.append(row)
    return Table(list(range(num_ranks)), with_reductions(rows))


SCHEDULES: dict[str, Callable[[int, int], Table]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def with_reductions(rows: Sequence[Sequence[Action | Overlap]]) -> list[list[Action | Overlap]]:
    """Copy ``rows`` with an R for each stage, right after the last action of that stage."""
    return [_with_reductions(row) for row in rows]


def _with_reductions(row: Sequence[Action | Overlap]) -> list[Action | Overlap]:
    cells = [(cell, cell if isinstance(cell, Overlap) else (cell,)) for cell in row]
    last = {action.stage: position for position, (_, actions) in enumerate(cells) for action in actions}
    reduced: list[Action | Overlap] = []
    for position, (cell, actions) in enumerate(cells):
        reduced.append(cell)
        stages = dict.fromkeys(action.stage for action in actions)
        reduced += [Action(Kind.R, stage) for stage in stages if last[stage] == position]
    return reduced


def _require_positive(num_ranks: int, num_microbatches: int) -> None:
    if num_ranks < 1 or num_microbatches < 1:
        raise ValueError(f"a schedule needs a rank and a microbatch at least, not {num_ranks} and {num_microbatches}")
