"""The two collectives of sequence parallelism, each the other's backward (arXiv 2205.05198).

Between the cut layers each rank holds ``T / tp`` consecutive tokens. A group of one rank does nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.collectives import all_gather, reduce_scatter


def gather_tokens(input_TH: Tensor, group: ProcessGroup) -> Tensor:
    """All-gather along the tokens: ``[T/tp, ...] -> [T, ...]``; the backward sums and cuts (reduce-scatter)."""
    return input_TH if group.size() == 1 else _GatherTokens.apply(input_TH, group)


def reduce_scatter_tokens(input_TH: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks and keep this rank's tokens: ``[T, ...] -> [T/tp, ...]``; the backward gathers."""
    return input_TH if group.size() == 1 else _ReduceScatterTokens.apply(input_TH, group)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TH, group):
        ctx.group = group
        return all_gather(input_TH, group)

    @staticmethod
    def backward(ctx, grad_TH):
        return reduce_scatter(grad_TH, ctx.group), None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TH, group):
        ctx.group = group
        return reduce_scatter(input_TH, group)

    @staticmethod
    def backward(ctx, grad_TH):
        return all_gather(grad_TH, ctx.group), None
