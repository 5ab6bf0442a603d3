"""Schedules in which the stages go round the ranks several times: interleaved 1F1B and looped breadth-first."""

from __future__ import annotations

from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.schedules.common import (
    Row,
    looped_placement,
    renumbered,
    require_positive,
    with_reductions,
)


def interleaved(num_ranks: int, num_microbatches: int, chunks: int = 2) -> Table:
    """One forward, one backward over ``chunks`` stages a rank (Megatron-LM, arXiv 2104.04473).

    Groups of ``num_ranks`` microbatches go through one chunk after the other; the last group may be smaller. The
    bubble is ``chunks`` times smaller than that of 1F1B. Peak activations on rank 0:
    ``num_ranks + (num_ranks - 1) / chunks``, in units of one microbatch of one rank's layers.
    """
    require_positive(num_ranks, num_microbatches, chunks)
    groups = range(-(-num_microbatches // num_ranks))
    order = [(chunk, group * num_ranks + m) for group in groups for chunk in range(chunks) for m in range(num_ranks)]
    rows = []
    for rank in range(num_ranks):
        forwards = [Action(Kind.F, chunk * num_ranks + rank, m) for chunk, m in order]
        backwards = [Action(Kind.B, (chunks - 1 - chunk) * num_ranks + rank, m) for chunk, m in order]
        warm_up = 2 * (num_ranks - rank - 1) + (chunks - 1) * num_ranks
        rows.append(_one_forward_one_backward(forwards, backwards, warm_up))
    rows = renumbered(rows, lambda action: action.microbatch if action.microbatch < num_microbatches else None)
    return Table(looped_placement(num_ranks, chunks), with_reductions(rows))


def _one_forward_one_backward(forwards: list[Action], backwards: list[Action], warm_up: int) -> Row:
    row: Row = [*forwards[:warm_up]]
    steady = forwards[warm_up:]
    for forward, backward in zip(steady, backwards, strict=False):
        row += [forward, backward]
    return row + backwards[len(steady) :]


def looped_bfs(num_ranks: int, num_microbatches: int, chunks: int = 2) -> Table:
    """All microbatches through one chunk, then all through the next (breadth-first, arXiv 2211.05953).

    The bubble of interleaved 1F1B with GPipe's peak activations; in return all work on a stage comes in one piece, so
    that its gradients are reduced early and its weights are gathered once a direction (fully sharded data parallelism).
    """
    require_positive(num_ranks, num_microbatches, chunks)
    microbatches = range(num_microbatches)
    rows: list[Row] = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * chunks, num_ranks)
        forwards = [Action(Kind.F, stage, m) for stage in stages for m in microbatches]
        backwards = [Action(Kind.B, stage, m) for stage in reversed(stages) for m in microbatches]
        rows.append([*forwards, *backwards])
    return Table(looped_placement(num_ranks, chunks), with_reductions(rows))
