"""Zero-bubble schedules with one stage on each rank (arXiv 2401.10241): weight gradients wait for idle time."""

from __future__ import annotations

from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.schedules.common import Row, require_positive, with_reductions


def zb_h1(num_ranks: int, num_microbatches: int) -> Table:
    """ZB-H1: 1F1B whose rank ``r`` computes weight gradients ``r`` microbatches late, to fill the end of the step.

    Bubble ``(p - 1)(F + I - W)`` of ``p`` ranks; peak activations ``p``, on every rank what 1F1B needs on rank 0.
    """
    return _zero_bubble(num_ranks, num_microbatches, lead=1)


def zb_h2(num_ranks: int, num_microbatches: int) -> Table:
    """ZB-H2: as ZB-H1, with twice the forwards on their way, to fill the start of the step as well.

    Bubble ``(p - 1)(F + I - 2W)``; peak activations ``2p - 1``.
    """
    return _zero_bubble(num_ranks, num_microbatches, lead=2)


def _zero_bubble(num_ranks: int, num_microbatches: int, lead: int) -> Table:
    """Rank ``p - 1 - d`` runs ``lead * d`` forwards ahead of its backwards; its weight gradients lag by the rest."""
    require_positive(num_ranks, num_microbatches)
    rows = []
    for rank in range(num_ranks):
        ahead, lag = lead * (num_ranks - 1 - rank), lead * rank
        row: Row = []
        # each turn does what falls due, as if the microbatches went on for ever, and skips those that do not exist
        for turn in range(num_microbatches + ahead + lag):
            due = ((Kind.F, turn), (Kind.I, turn - ahead), (Kind.W, turn - ahead - lag))
            row += [Action(kind, rank, m) for kind, m in due if 0 <= m < num_microbatches]
        rows.append(row)
    return Table(list(range(num_ranks)), with_reductions(rows))
