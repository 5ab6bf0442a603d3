"""Row exchanges of the dispatcher, each with its backward. Row counts differ from rank to rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_to_all_rows(rows: Tensor, receive: Sequence[int], send: Sequence[int], group: ProcessGroup) -> Tensor:
    """Send ``send[r]`` rows to rank r, receive ``receive[r]`` from it: ``[sum(send), ...] -> [sum(receive), ...]``."""
    return rows if group.size() == 1 else _AllToAll.apply(rows, receive, send, group)


def gather_rows(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Concatenate the ranks' rows, ``counts[r]`` from rank r; the backward sums each rank's part."""
    return rows if group.size() == 1 else _GatherRows.apply(rows, counts, group)


def reduce_scatter_rows(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Sum over the ranks and keep this rank's ``counts[rank]`` rows; the backward gathers."""
    return rows if group.size() == 1 else _ReduceScatterRows.apply(rows, counts, group)


def _exchange(rows: Tensor, receive: Sequence[int], send: Sequence[int], group: ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


# gloo has neither an all-gather nor a reduce-scatter of unequal parts, so both are an all-to-all.
def _gather(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    copies = rows.repeat(group.size(), *[1] * (rows.dim() - 1))
    return _exchange(copies, counts, [rows.shape[0]] * group.size(), group)


def _reduce_scatter(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    mine = counts[group.rank()]
    return _exchange(rows, [mine] * group.size(), counts, group).unflatten(0, (group.size(), mine)).sum(0)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, receive, send, group):
        ctx.receive, ctx.send, ctx.group = receive, send, group
        return _exchange(rows, receive, send, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.send, ctx.receive, ctx.group), None, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts, group):
        ctx.counts, ctx.group = counts, group
        return _gather(rows, counts, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.counts, ctx.group), None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, counts, group):
        ctx.counts, ctx.group = counts, group
        return _reduce_scatter(rows, counts, group)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.counts, ctx.group), None, None
