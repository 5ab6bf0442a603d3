"""Cross-entropy from logits whose vocabulary is cut over the tensor-parallel group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def vocab_parallel_cross_entropy(logits_TV: Tensor, labels_T: Tensor, group: ProcessGroup) -> Tensor:
    """Negative log-likelihood of each label. ``logits_TV`` is overwritten (its gradient is made in its place).

    Args:
        logits_TV: ``[T, V / tp]``, this rank's part of the vocabulary; rank r of ``group`` has ids from ``r * V / tp``.
        labels_T: ``[T]`` int64 ids of the whole vocabulary.
        group: the tensor-parallel group. Two all-reduces of ``[T]`` and ``[2, T]``; the vocabulary is never gathered.

    Returns:
        ``[T]`` float32 (float64 for float64 logits), the same on each rank.
    """
    return _CrossEntropy.apply(logits_TV, labels_T, group)


class _CrossEntropy(torch.autograd.Function):
    """Softmax over this rank's part in one pass; the parts are put together by their log-sum-exp."""

    @staticmethod
    def forward(ctx, logits_TV, labels_T, group):
        logits = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        parallel = group.size() > 1
        rows = labels_T.unsqueeze(1)
        elsewhere = None
        if parallel:
            rows = rows - group.rank() * logits.shape[1]
            elsewhere = (rows < 0) | (rows >= logits.shape[1])
            rows = rows.masked_fill(elsewhere, 0)
        target = logits.gather(1, rows)
        if elsewhere is not None:
            target = target.masked_fill(elsewhere, 0)
        target, maximum = target.squeeze(1), logits.amax(dim=1)
        probabilities = torch.softmax(logits, dim=1, out=logits)
        local_lse = maximum - probabilities.amax(dim=1).log()
        lse, share = local_lse, None
        if parallel:
            largest = local_lse.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            both = torch.stack([(local_lse - largest).exp(), target])
            dist.all_reduce(both, group=group)
            total, target = both.unbind()
            lse = largest + total.log()
            share = (local_lse - lse).exp()
        ctx.probabilities, ctx.share, ctx.rows, ctx.elsewhere = probabilities, share, rows, elsewhere
        ctx.dtype = logits_TV.dtype
        return lse - target

    @staticmethod
    def backward(ctx, grad_T):
        gradient, ctx.probabilities = ctx.probabilities, None
        assert gradient is not None, "this backward runs once: the logits were overwritten by their gradient"
        gradient.mul_((grad_T if ctx.share is None else grad_T * ctx.share).unsqueeze(1))
        of_target = -grad_T.unsqueeze(1)
        if ctx.elsewhere is not None:
            of_target = of_target.masked_fill(ctx.elsewhere, 0)
        gradient.scatter_add_(1, ctx.rows, of_target)
        return gradient.to(ctx.dtype), None, None
