"""``policy_head``: log-probabilities, entropy and a policy-gradient loss straight from hidden states and the head.

The logits of all tokens are never in memory at once. Tokens go through in chunks: their logits (one matrix product), a
pass that reads them once (``policy_tile``), the loss of each token, and its small gradient by log-probability and
entropy; from these a second pass writes the gradient over the logits, and two products make those of hidden states and
weight. So the gradient is made in the forward pass, with three matrix products where keeping nothing and computing the
logits again in the backward takes four. Tokens that the mask leaves out are dropped before the first product; those
whose gradient is exactly zero (a group of equal rewards, a clipped ratio without a KL term) skip the other two.

Where the vocabulary is cut over tensor-parallel ranks, they exchange four numbers a token and chunk.

Shapes: T tokens, H hidden, V this rank's part of the vocabulary, C tokens of a chunk, R tokens whose loss is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from r1mega.kernels.fake import is_fake
from r1mega.kernels.parameter import WeightGradients, gradient_buffer, like_parameter
from r1mega.kernels.policy_chunks import Chunks, Losses


@dataclass(frozen=True)
class PolicyOutput:
    """What :func:`policy_head` returns.

    Args:
        loss: scalar, the sum over the tokens that the mask keeps; the only one that is differentiable.
        log_probs_T: ``[T]``, of the targets; 0 where the mask leaves a token out.
        entropy_T: ``[T]``, of the distribution over the whole vocabulary; 0 where the mask leaves a token out.
    """

    loss: Tensor
    log_probs_T: Tensor
    entropy_T: Tensor


def policy_head(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    losses: Losses,
    *,
    mask_T: Tensor | None = None,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk: int | None = None,
    store: WeightGradients | None = None,
) -> PolicyOutput:
    """The sum of ``losses`` of the tokens' log-probabilities under ``softmax(hidden @ weight.T / temperature)``.

    The gradient reaches hidden states and weight, nothing else that ``losses`` may use. It is made here, if grad mode
    is on and one of them requires it, and handed over in the backward, which therefore runs once and has no product
    left to do: under a zero-bubble schedule the whole gradient is in the F, and I hands over the weight's part as well
    (kept until the W, it would only hold memory). Between forward and backward a buffer of the weight's size, float32
    or wider, waits; a forward that runs without a graph and again with one, as recomputation does, makes the gradient
    once.

    Args:
        hidden_TH: ``[T, H]``, the same on all ranks of ``group``; float32, float64 or bfloat16.
        weight_VH: ``[V, H]`` of the same type, a parameter: its gradient goes where that of
            ``r1mega.kernels.linear.linear`` does. With a group its local shard is this rank's part, and rank r has the
            ids from ``r * V``.
        targets_T: ``[T]`` int64 ids of the whole vocabulary; not looked at where the mask leaves a token out.
        losses: ``losses(log_probs_R, entropy_R, rows_R) -> [R]``, differentiable and elementwise: the loss of token
            ``rows_R[i]`` (int64, of T) from its log-probability and entropy. It is called once a chunk, with tensors of
            float32 or wider. The sum is not divided by anything: a normaliser belongs into ``losses``.
        mask_T: ``[T]`` bool, which tokens count; None for all.
        temperature: what the logits are divided by.
        group: the tensor-parallel group; None for one rank. One all-gather of ``[C, 4]`` a chunk. Every rank returns
            the same values, and as gradient of ``hidden_TH`` what its part of the vocabulary adds to it: the sum over
            ranks is the gradient, which the backward of ``gather_tokens`` makes (as for any column-cut layer).
        chunk: tokens at a time; None chooses.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        Loss, log-probabilities and entropy, float32 or wider.

    Raises:
        ValueError: shapes, types, temperature, chunk, or a target outside the vocabulary (on a GPU, where nothing waits
            for the answer, that is an assertion of the device).
    """
    chunks = Chunks.of(hidden_TH, weight_VH, targets_T, mask_T, temperature, group, chunk)
    if torch.is_grad_enabled():
        chunks.for_hidden, chunks.for_weight = hidden_TH.requires_grad, weight_VH.requires_grad
    return PolicyOutput(*_PolicyHead.apply(hidden_TH, weight_VH, chunks, losses, store))


@torch.no_grad()
def policy_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    mask_T: Tensor | None = None,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropy of :func:`policy_head`, ``[T]`` each, without gradients: one matrix product."""
    chunks = Chunks.of(hidden_TH, weight_VH, targets_T, mask_T, temperature, group, chunk)
    _, log_probs_T, entropy_T = chunks.run(hidden_TH, None)
    return log_probs_T, entropy_T


def reference_policy_head(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    losses: Losses,
    *,
    mask_T: Tensor | None = None,
    temperature: float = 1.0,
) -> PolicyOutput:
    """:func:`policy_head` of one rank in PyTorch's differentiable operations, which is what it means.

    Half-precision products are taken as float32, so that no logit is rounded.
    """
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    keep_T = torch.ones_like(targets_T, dtype=torch.bool) if mask_T is None else mask_T
    rows_R = keep_T.nonzero().squeeze(1)
    logits_RV = hidden_TH[rows_R].to(wide) @ weight_VH.to(wide).t() / temperature
    logs_RV = F.log_softmax(logits_RV, dim=1)
    log_probs_R = logs_RV.gather(1, targets_T[rows_R].unsqueeze(1)).squeeze(1)
    entropy_R = -(logs_RV.exp() * logs_RV).sum(1)
    loss = losses(log_probs_R, entropy_R, rows_R).sum()
    zeros = logs_RV.new_zeros(len(targets_T))
    return PolicyOutput(
        loss, zeros.index_put((rows_R,), log_probs_R.detach()), zeros.index_put((rows_R,), entropy_R.detach())
    )


class _PolicyHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight, chunks, losses, store):
        loss, log_probs_T, entropy_T = chunks.run(hidden_TH, losses)
        # The weight is not saved through autograd: FSDP frees and refills its storage between forward and backward.
        ctx.weight, ctx.store = weight, store
        ctx.gradients = chunks.grad_hidden, chunks.grad_weight
        ctx.mark_non_differentiable(log_probs_T, entropy_T)
        return loss, log_probs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        assert ctx.gradients is not None, "this backward runs once: it hands over the gradients that the forward made"
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if not is_fake(grad_loss) and grad_loss.item() != 1:
            for gradient in (grad_hidden, grad_weight):
                if gradient is not None:
                    gradient.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = _hand_over(grad_weight, ctx.weight, ctx.store)
        return grad_hidden, grad_weight, None, None, None


@torch.no_grad()
def _hand_over(gradient_VH: Tensor, weight: Tensor, store: WeightGradients | None) -> Tensor | None:
    """To autograd, or into the weight's gradient now: a store that keeps it for a W would only hold its memory."""
    if store is not None and weight.grad is not None:
        gradient_buffer(weight).add_(gradient_VH)
        return None
    gradient = like_parameter(gradient_VH.to(weight.dtype), weight)
    if store is None:
        return gradient
    weight.grad = gradient
    return None
