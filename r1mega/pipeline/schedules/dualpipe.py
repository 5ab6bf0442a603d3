"""DualPipe and DualPipeV: microbatches come from both ends, and a forward hides the messages of a backward.

DeepSeek-V3 (arXiv 2412.19437, section 3.2.1) and DeepSeek's release of both schedules. Every rank runs two streams: the
near one reaches it early, the far one late. In DualPipe they are two copies of the model in opposite directions, in
DualPipeV the two arms of a V. With ``p`` stages from end to end the peak is ``p + 1`` microbatches of a stage, and the
bubble ``(p / 2 - 1)(F&B + B - 3W)``, ``B`` a full backward: the middle ranks have exactly that where F, I and W take
the same time, whatever an overlap (F&B) takes.
"""

from __future__ import annotations

from r1mega.pipeline.actions import Action, Kind, Overlap, Table
from r1mega.pipeline.schedules.common import Row, renumbered, require_positive, v_placement, with_reductions


def dualpipe(num_ranks: int, num_microbatches: int) -> Table:
    """Two copies of the model: stages 0 to ``p - 1`` on ranks 0 to ``p - 1``, stages ``p`` to ``2p - 1`` the other way.

    The first half of the microbatches goes through the first copy. Peak activations: ``p + 1``, with twice the weights.
    """
    require_positive(num_ranks, num_microbatches)
    # An odd number of ranks is the next even one without a middle rank. Whoever waited for that rank now waits for the
    # one before it, which had to come earlier anyway, so the order stays free of deadlock.
    half = (num_ranks + 1) // 2
    first_copy = (num_microbatches + 1) // 2
    rows = []
    for rank in range(num_ranks):
        forth, back = rank, 2 * num_ranks - 1 - rank
        near, far = (forth, back) if rank < half else (back, forth)
        rows.append(_row(near, far, min(rank, num_ranks - 1 - rank), half, max(first_copy, 2 * half)))

    def number(action: Action) -> int | None:
        if action.stage < num_ranks:
            return action.microbatch if action.microbatch < first_copy else None
        microbatch = first_copy + action.microbatch
        return microbatch if microbatch < num_microbatches else None

    rows = with_reductions(renumbered(rows, number))
    if num_microbatches == 1:
        # the second copy has no work, but the ranks that it shares its gradients with wait for it
        for rank, row in enumerate(rows):
            row.append(Action(Kind.R, 2 * num_ranks - 1 - rank))
    return Table(v_placement(num_ranks), rows, num_copies=2)


def dualpipev(num_ranks: int, num_microbatches: int) -> Table:
    """Half of DualPipe: one copy of the model in a V, ``p = 2 * num_ranks`` stages, two on each rank."""
    require_positive(num_ranks, num_microbatches)
    count = max(num_microbatches, 2 * num_ranks)
    rows = [_row(rank, 2 * num_ranks - 1 - rank, rank, num_ranks, count) for rank in range(num_ranks)]
    rows = renumbered(rows, lambda action: action.microbatch if action.microbatch < num_microbatches else None)
    return Table(v_placement(num_ranks), with_reductions(rows))


def _row(near: int, far: int, from_end: int, half: int, count: int) -> Row:
    """What a rank does in ``count`` microbatches of each stream, at least ``2 * half``.

    Args:
        near: its stage in the stream that reaches it first.
        far: its stage in the other stream.
        from_end: ranks between it and the end of the pipeline that is nearer.
        half: ranks from an end to the middle.
        count: microbatches of each stream.
    """
    to_middle = half - 1 - from_end
    near_forward, far_forward, near_backward, far_backward = (
        iter([Action(kind, stage, m) for m in range(count)]) for kind in (Kind.F, Kind.B) for stage in (near, far)
    )
    weights: list[Action] = []

    def split(backward: Action) -> Action:
        weights.append(backward._replace(kind=Kind.W))
        return backward._replace(kind=Kind.I)

    row: Row = [next(near_forward) for _ in range(2 * to_middle)]
    for _ in range(from_end + 1):
        row += [next(near_forward), next(far_forward)]
    for _ in range(to_middle):
        row += [split(next(far_backward)), weights.pop(), next(far_forward)]
    for turn in range(count - 2 * half + from_end + 1):
        if turn == 0 and to_middle == 0:  # the next rank waits for this forward: let it end early
            row += [next(near_forward), next(far_backward)]
        else:
            row.append(Overlap(next(near_forward), next(far_backward)))
        row.append(Overlap(next(far_forward), next(near_backward)))
    for _ in range(to_middle):
        row += [next(far_backward), Overlap(next(far_forward), next(near_backward))]
    last = [backward for _ in range(from_end + 1) for backward in (next(far_backward), next(near_backward))]
    row += last[: from_end + 1] + [split(backward) for backward in last[from_end + 1 :]]
    for _ in range(to_middle):
        row += [weights.pop(0), split(next(near_backward))]
    return row + weights
