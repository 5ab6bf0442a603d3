"""From router logits to everything that dispatch needs: experts, weights, ranks and counts, without a sort or a mask.

Scores, group-limited choice and weights follow DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). Shapes: T tokens,
E experts, K choices a token, G groups of experts.

* An expert's value is its score plus its bias. Where groups are limited, a group's value is the sum of its two best
  experts' values; experts of groups that are not kept have the value -infinity. (megatron-core's sum is over the best
  ``top_k // top_k_groups``: the same where that is 2, as for DeepSeek-V3, and else another router.)
* The K experts with the greatest values are chosen, best first. Of equal values the lower index wins, among groups as
  among experts; ``torch.topk``, which others use, chooses any of them.
* Infinite logits are numbers to a sigmoid, whose scores are 1 and 0. To a softmax -infinity is a score of 0; a token
  with +infinity, or with nothing but -infinity, has no softmax: all its scores are NaN. So are those of a token with a
  logit that is NaN; with a sigmoid it is that expert's score alone.
* NaN is greater than all numbers, as for ``torch.topk``, and so is a group's value with NaN in it: a token with NaN in
  its scores gets K valid experts, the lowest of those that are NaN first, and a weight that is NaN (all of them, where
  they are normalised), so that a broken model is seen. Counts and ranks are right in any case.
* The rank of a choice is the number of earlier choices of the same expert, counted token by token: with it, the place
  of each row is known before any row is moved, and it is the same in every run. It is counted inside a tile of tokens,
  since tiles are worked on side by side: the row of a choice is the first row of its tile and expert plus the rank.
  On the CPU one tile has all tokens; on a GPU a tile has :data:`TILE_TOKENS`. ``r1mega.kernels.scan`` makes first rows.
* The gradient comes from the K scores of the chosen experts, and only these are kept: with a sigmoid the other scores
  are in no weight; softmax and division by the chosen scores' sum are a softmax over the chosen experts (up to the
  1e-20 that is added to the sum). Kept as a whole are the scores of a softmax that is not normalised, whose weights
  depend on all of them, and those that were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.kernels import check, cuda, native, triton
from r1mega.kernels.scan import first_rows, reference_scan, scan

TILE_TOKENS = cuda.TILE_TOKENS


@dataclass
class RouteOptions:
    """How experts are chosen and weighted.

    Args:
        top_k: K.
        score_function: ``sigmoid`` or ``softmax``.
        num_groups: G; divides E.
        top_k_groups: groups that a token's experts may come from.
        normalize: divide the weights by their sum (plus 1e-20).
        factor: factor of the weights.

    Raises:
        ValueError: for numbers that no router can have.
    """

    top_k: int
    score_function: str = "sigmoid"
    num_groups: int = 1
    top_k_groups: int = 1
    normalize: bool = True
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.score_function not in ("sigmoid", "softmax"):
            raise ValueError(f"score_function: must be sigmoid or softmax, not {self.score_function}")
        if self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1")
        if not 1 <= self.top_k_groups <= self.num_groups:
            raise ValueError(f"top_k_groups={self.top_k_groups}: must be from 1 to num_groups ({self.num_groups})")

    @property
    def needs_logits(self) -> bool:
        """Whether the weights' gradient needs more than the scores of the chosen experts.

        Normalised weights of a softmax do not depend on the experts that were not chosen.
        """
        return self.score_function == "softmax" and not self.normalize


@dataclass
class Choices:
    """What :func:`route` decides.

    Args:
        experts_TK: ``[T, K]`` int64, best first.
        weights_TK: ``[T, K]`` in the type of the logits, differentiable.
        ranks_TK: ``[T, K]`` int64, how many earlier choices of the tile went to the same expert.
        counts_E: ``[E]`` int64, choices of each expert.
        first_row_NE: ``[N, E]`` int64, the row of the first choice of each tile and expert, where the rows of an expert
            stand together, experts in order.
        sum_scores: makes :attr:`score_sums_E`.
        scores_TE: ``[T, E]``, differentiable; None where they were not asked for.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    ranks_TK: Tensor
    counts_E: Tensor
    first_row_NE: Tensor
    sum_scores: Callable[[], Tensor]
    scores_TE: Tensor | None = None

    @cached_property
    def score_sums_E(self) -> Tensor:
        """``[E]``, the sum over tokens of the scores, each token's divided by their sum; without gradient.

        For load statistics, and for stacks whose auxiliary loss is over the batch. The loss of ``r1mega.moe`` is not
        made of them: it is of each sequence, and its gradient needs all scores anyway. They stay in the GPU's kernels,
        which add them while the scores are in registers; on a CPU they are made when they are asked for.
        """
        return self.sum_scores()


def route(logits_TE: Tensor, bias_E: Tensor | None, options: RouteOptions, with_scores: bool = False) -> Choices:
    """Choose K experts for each token; see the head of this file.

    Args:
        logits_TE: ``[T, E]`` float32 or wider.
        bias_E: ``[E]``, added for the choice but not to the weights; no gradient.
        options: how.
        with_scores: give all scores, too; a GPU has to write them for that.

    Raises:
        ValueError: for shapes, types, devices or options that do not fit.
    """
    _check(logits_TE, bias_E, options)
    if bias_E is not None:
        bias_E = bias_E.to(logits_TE.dtype)
    sums = partial(_score_sums, logits_TE, options)
    if native.takes(logits_TE, bias_E) and logits_TE.shape[1] <= native.library.MAX_EXPERTS:  # type: ignore[union-attr]
        experts, weights, ranks, counts, scores = _Route.apply(logits_TE, bias_E, options, with_scores)
        return Choices(experts, weights, ranks, counts, first_rows(counts).unsqueeze(0), sums, scores)
    kernels = _gpu_kernels(logits_TE, bias_E, options)
    if kernels is not None:
        experts, weights, ranks, counts, first_row, sums = _RouteOnGPU.apply(logits_TE, bias_E, options, kernels)
        scores = _scores(logits_TE, options) if with_scores else None
        return Choices(experts, weights, ranks, counts, first_row, lambda: sums, scores)
    return reference_route(logits_TE, bias_E, options, with_scores)


def _check(logits_TE: Tensor, bias_E: Tensor | None, options: RouteOptions) -> None:
    check.matrix("logits_TE", logits_TE)
    if not logits_TE.is_floating_point() or logits_TE.dtype.itemsize < 4:  # many scores would be equal, rounded so
        raise ValueError(f"logits_TE: must be float32 or wider, not {logits_TE.dtype}")
    num_experts = logits_TE.shape[1]
    if bias_E is not None:
        check.shaped("bias_E", bias_E, (num_experts,), logits_TE.device)
    if options.top_k > num_experts:
        raise ValueError(f"top_k={options.top_k}: there are only {num_experts} experts")
    if num_experts % options.num_groups:
        raise ValueError(f"num_groups={options.num_groups}: must divide the number of experts ({num_experts})")


def reference_route(
    logits_TE: Tensor, bias_E: Tensor | None, options: RouteOptions, with_scores: bool = False
) -> Choices:
    """:func:`route` in PyTorch's operations."""
    scores = _scores(logits_TE, options)
    experts = choose_experts(scores, bias_E, options)
    weights = scores.gather(1, experts)
    if options.normalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    ranks, counts = reference_rank_choices(experts, logits_TE.shape[1])
    first_row = reference_scan(counts.unsqueeze(0))[0]
    weights, sums = weights * options.factor, partial(_score_sums, logits_TE, options)
    return Choices(experts, weights, ranks, counts, first_row, sums, scores if with_scores else None)


@torch.no_grad()
def _score_sums(logits_TE: Tensor, options: RouteOptions) -> Tensor:
    scores_TE = _scores(logits_TE, options)
    return (scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)).sum(0)


def choose_experts(scores_TE: Tensor, bias_E: Tensor | None, options: RouteOptions) -> Tensor:
    """The K experts of each token: the best biased scores inside the best groups. ``[T, K]`` int64."""
    values = scores_TE.detach()
    if bias_E is not None:
        values = values + bias_E
    if options.num_groups > 1:
        grouped = values.unflatten(1, (options.num_groups, -1))
        of_group = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best_groups = _best_first(of_group)[:, : options.top_k_groups]
        left_out = torch.ones_like(of_group, dtype=torch.bool).scatter_(1, best_groups, False)
        values = grouped.masked_fill(left_out.unsqueeze(-1), -math.inf).flatten(1)
    return _best_first(values)[:, : options.top_k]


def rank_choices(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Ranks ``[T, K]`` over all tokens and counts ``[E]`` (both int64) of choices that something else made.

    Args:
        experts_TK: ``[T, K]``, integers of any type; those of one token differ. E marks a dropped choice, whose rank
            means nothing.
        num_experts: E.

    Raises:
        ValueError: for no integers or another shape; and for ids outside of 0 to E where the C++ kernel runs. (A GPU
            cannot say so without a wait. Its kernel is not made for such ids.)
    """
    check.matrix("experts_TK", experts_TK)
    experts_TK = check.integers("experts_TK", experts_TK).contiguous()
    if cuda.takes(experts_TK) and experts_TK.shape[1] > 0 and 0 < num_experts <= cuda.MAX_EXPERTS:
        return _rank_on_gpu(experts_TK, num_experts)
    if not native.takes_integers(experts_TK):
        return reference_rank_choices(experts_TK, num_experts)
    ranks, counts = torch.empty_like(experts_TK), experts_TK.new_empty(num_experts)
    native.library.rank_choices(  # type: ignore[union-attr]
        experts_TK.data_ptr(), ranks.data_ptr(), counts.data_ptr(), experts_TK.numel(), num_experts
    )
    return ranks, counts


def _rank_on_gpu(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    ranks, tile_counts = cuda.rank(experts_TK, num_experts)
    first_row, counts, _ = scan(tile_counts)
    of_earlier_tiles = (first_row - first_row[:1]).flatten()
    return ranks.add_(of_earlier_tiles[places(experts_TK, first_row.shape)]), counts


def places(experts_TK: Tensor, shape: Sequence[int]) -> Tensor:
    """Where each choice's tile and expert are in a flattened tensor of ``shape`` [N, E]; a dropped one's is any."""
    num_tiles, num_experts = shape
    inside = experts_TK.clamp(max=num_experts - 1)
    if num_tiles == 1:
        return inside
    tiles = torch.arange(experts_TK.shape[0], device=experts_TK.device) // TILE_TOKENS
    return inside + (tiles * num_experts).unsqueeze(1)


def reference_rank_choices(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """:func:`rank_choices` in PyTorch's operations, by a stable sort; of int64."""
    flat = experts_TK.flatten()
    # Not bincount: on a GPU it waits for the greatest value, and it has no shape where there are no numbers.
    counts = flat.new_zeros(num_experts + 1).scatter_add_(0, flat, torch.ones_like(flat))
    order = flat.argsort(stable=True)
    ranks = torch.empty_like(flat)
    ranks[order] = torch.arange(flat.shape[0], device=flat.device) - first_rows(counts)[flat[order]]
    return ranks.view_as(experts_TK), counts[:num_experts]


def _best_first(values: Tensor) -> Tensor:
    return values.sort(dim=-1, descending=True, stable=True).indices


def _scores(logits_TE: Tensor, options: RouteOptions) -> Tensor:
    return logits_TE.sigmoid() if options.score_function == "sigmoid" else logits_TE.softmax(dim=-1)


def _gpu_kernels(logits_TE: Tensor, bias_E: Tensor | None, options: RouteOptions) -> ModuleType | None:
    """The kernels that run for these on a GPU: CUDA's, then Triton's."""
    if cuda.takes_route(logits_TE, bias_E, options):
        return cuda
    if logits_TE.shape[0] == 0 or logits_TE.dtype != torch.float32 or not triton.takes(logits_TE, bias_E):
        return None
    from r1mega.kernels.triton import route as kernels

    return kernels


class _Route(torch.autograd.Function):
    # The scores are PyTorch's own here, too: with another exponential, nearly equal scores would be chosen otherwise.
    @staticmethod
    def forward(ctx, logits, bias, options, with_scores):
        scores = _scores(logits, options).contiguous()
        num_tokens, num_experts = scores.shape
        weights = scores.new_empty(num_tokens, options.top_k)
        experts = torch.empty(weights.shape, dtype=torch.int64)
        ranks, counts = torch.empty_like(experts), experts.new_empty(num_experts)
        all_scores = with_scores or options.needs_logits
        chosen_scores = torch.empty_like(weights) if ctx.needs_input_grad[0] and not all_scores else None
        if bias is not None:
            bias = bias.contiguous()
        native.call(
            "route", scores, scores, bias, experts, weights, chosen_scores, ranks, counts, num_tokens, num_experts,
            options.top_k, options.num_groups, options.top_k_groups, options.normalize, options.factor,
        )  # fmt: skip
        ctx.save_for_backward(scores if all_scores else chosen_scores, experts)
        ctx.options, ctx.all_scores, ctx.shape = options, all_scores, scores.shape
        ctx.mark_non_differentiable(experts, ranks, counts)
        ctx.set_materialize_grads(False)
        return experts, weights, ranks, counts, scores if with_scores else None

    @staticmethod
    @once_differentiable
    def backward(ctx, _experts, grad_weights, _ranks, _counts, grad_scores):
        scores, experts = ctx.saved_tensors
        options = ctx.options
        if grad_weights is None and grad_scores is None:
            return None, None, None, None
        grad_weights, grad_scores = (
            None if grad is None else grad.contiguous() for grad in (grad_weights, grad_scores)
        )
        grad_logits = scores.new_empty(ctx.shape)
        of = options.top_k, options.normalize, options.score_function == "softmax", options.factor
        if ctx.all_scores:
            given = grad_weights, grad_scores, scores, experts, grad_logits
            native.call("route_backward", scores, *given, *ctx.shape, *of)
        else:
            native.call("chosen_backward", scores, grad_weights, scores, experts, grad_logits, *ctx.shape, *of)
        return grad_logits, None, None, None


class _RouteOnGPU(torch.autograd.Function):
    """Keeps the chosen experts and their scores; the logits only where the gradient needs all scores.

    ``kernels`` is a module with ``route`` and ``route_backward``.
    """

    @staticmethod
    def forward(ctx, logits, bias, options, kernels):
        logits = logits.contiguous()
        bias = None if bias is None else bias.contiguous()
        experts, weights, ranks, tile_counts, tile_sums, chosen_scores = kernels.route(logits, bias, options)
        first_row, counts, sums = scan(tile_counts, tile_sums)
        ctx.save_for_backward(experts, chosen_scores, logits if options.needs_logits else None)
        ctx.options, ctx.num_experts, ctx.kernels = options, logits.shape[1], kernels
        ctx.mark_non_differentiable(experts, ranks, counts, first_row, sums)
        ctx.set_materialize_grads(False)
        return experts, weights, ranks, counts, first_row, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, _experts, grad_weights, *_others):
        if grad_weights is None:
            return None, None, None, None
        experts, chosen_scores, logits = ctx.saved_tensors
        given = grad_weights.contiguous(), experts, chosen_scores, ctx.num_experts, ctx.options, logits
        return ctx.kernels.route_backward(*given), None, None, None
