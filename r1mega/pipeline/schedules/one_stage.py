"""Schedules with one stage on each rank and a whole backward: GPipe and 1F1B."""

from __future__ import annotations

from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.schedules.common import Row, require_positive, with_reductions


def gpipe(num_ranks: int, num_microbatches: int) -> Table:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965). Peak activations: every microbatch."""
    require_positive(num_ranks, num_microbatches)
    microbatches = range(num_microbatches)
    rows: list[Row] = [
        [Action(kind, rank, m) for kind in (Kind.F, Kind.B) for m in microbatches] for rank in range(num_ranks)
    ]
    return Table(list(range(num_ranks)), with_reductions(rows))


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Table:
    """Forwards until the pipeline is full, then one forward, one backward (PipeDream-flush, arXiv 2006.09503).

    Peak activations: ``min(num_ranks - rank, num_microbatches)``.
    """
    require_positive(num_ranks, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        warm_up = min(num_ranks - rank - 1, num_microbatches)
        row: Row = [Action(Kind.F, rank, m) for m in range(warm_up)]
        for m in range(warm_up, num_microbatches):
            row += [Action(Kind.F, rank, m), Action(Kind.B, rank, m - warm_up)]
        row += [Action(Kind.B, rank, m) for m in range(num_microbatches - warm_up, num_microbatches)]
        rows.append(row)
    return Table(list(range(num_ranks)), with_reductions(rows))
