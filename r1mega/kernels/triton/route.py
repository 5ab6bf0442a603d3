"""Routing in one pass over the logits: experts, weights, ranks inside a tile of tokens, counts and sums of scores.

What is chosen is defined in ``r1mega.kernels.route``, ties and NaN included. To compare as it says, numbers become
integers of the same order, NaN the greatest; an expert that is taken becomes the least of all. (There is no -0: scores
are not negative, and 0 plus a bias of -0 is 0.)

A program does one tile of :data:`TILE_TOKENS` tokens, some at a time and in order, so that a rank is the number of
earlier tokens of the tile that chose the same expert (the experts of one token differ). Groups are padded to a power of
two and so are their members: slot ``g * MEMBERS_PADDED + m`` is expert ``g * MEMBERS + m``, in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega.kernels.route import RouteOptions
from r1mega.kernels.triton.compat import exp, launch, padded, pieces
from r1mega.kernels.triton.scan import TILE_TOKENS

SCORES_AT_ONCE = 4096  # of several tokens; few enough that all stay in registers
SCORES_AT_ONCE_BACKWARD = 2048
TAKEN = tl.constexpr(-(2**31))
LEFT_OUT = tl.constexpr(-2139095041)  # the integer of -infinity
NAN = tl.constexpr(0x7FFFFFFF)


def route(
    logits_TE: Tensor, bias_E: Tensor | None, options: RouteOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose K experts for each token.

    Args:
        logits_TE: ``[T, E]`` float32, contiguous.
        bias_E: ``[E]`` float32, contiguous, added for the choice but not to the weights.
        options: how.

    Returns:
        experts ``[T, K]`` int64; weights ``[T, K]`` float32; ranks inside the tile ``[T, K]`` int64; choices of each
        tile ``[N, E]`` int32; the sum over its tokens of the scores, each token's divided by their sum, ``[N, E]``
        float32 (``scan`` adds them up: a sum by atomic additions would differ from run to run); and the scores of the
        experts that were chosen, ``[T, K]`` float32, for :func:`route_backward`.
    """
    num_tokens, num_experts = logits_TE.shape
    num_tiles, new = pieces(num_tokens, TILE_TOKENS), logits_TE.new_empty
    experts, ranks = (new(num_tokens, options.top_k, dtype=torch.int64) for _ in range(2))
    weights, chosen_scores = (new(num_tokens, options.top_k) for _ in range(2))
    tile_counts, tile_sums = new(num_tiles, num_experts, dtype=torch.int32), new(num_tiles, num_experts)
    groups, members = padded(options.num_groups), padded(num_experts // options.num_groups)
    at_once = min(max(SCORES_AT_ONCE // (groups * members), 1), TILE_TOKENS)
    if num_tokens:
        arguments = (
            logits_TE, bias_E, experts, weights, ranks, tile_counts, tile_sums, chosen_scores, num_tokens,
            float(options.factor), num_experts, options.top_k, padded(options.top_k), options.num_groups, groups,
            members, options.top_k_groups, options.score_function == "softmax", options.normalize, TILE_TOKENS, at_once,
        )  # fmt: skip
        launch(_route, (num_tiles,), arguments, num_warps=8)
    return experts, weights, ranks, tile_counts, tile_sums, chosen_scores


@triton.jit
def _integers(numbers):
    bits = numbers.to(tl.int32, bitcast=True)
    return tl.where(numbers == numbers, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN)


@triton.jit
def _numbers(integers):
    return (integers ^ ((integers >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scores(logits, real, SOFTMAX: tl.constexpr):
    """Scores of each row; 0 where ``real`` is false."""
    if SOFTMAX:
        logits = tl.where(real[None, :], logits, float("-inf"))
        powers = exp(logits - tl.max(logits, 1)[:, None])
        scores = tl.div_rn(powers, tl.sum(powers, 1)[:, None])
    else:
        scores = tl.div_rn(1.0, 1.0 + exp(-logits))
    return tl.where(real[None, :], scores, 0.0)


@triton.jit
def _leave_out_groups(
    values, NUM_GROUPS: tl.constexpr, MEMBERS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    MEMBERS_PADDED: tl.constexpr, KEPT_GROUPS: tl.constexpr,
):  # fmt: skip
    """``values`` with those of all but the best groups set to -infinity's."""
    grouped = tl.reshape(values, (values.shape[0], GROUPS_PADDED, MEMBERS_PADDED))
    of_group = _numbers(tl.max(grouped, 2))
    if MEMBERS > 1:
        member = tl.arange(0, MEMBERS_PADDED)
        first = member[None, None, :] == tl.argmax(grouped, 2)[:, :, None]
        of_group += _numbers(tl.max(tl.where(first, TAKEN, grouped), 2))
    group = tl.arange(0, GROUPS_PADDED)
    group_values = tl.where(group[None, :] < NUM_GROUPS, _integers(of_group), TAKEN)
    kept = tl.zeros(group_values.shape, tl.int1)
    for _ in tl.static_range(KEPT_GROUPS):
        best = group[None, :] == tl.argmax(group_values, 1)[:, None]
        kept = kept | best
        group_values = tl.where(best, TAKEN, group_values)
    grouped = tl.where(kept[:, :, None] | (grouped == TAKEN), grouped, LEFT_OUT)
    return tl.reshape(grouped, values.shape)


@triton.jit
def _route(
    logits_TE, bias_E, experts_TK, weights_TK, ranks_TK, tile_counts_NE, tile_sums_NE, chosen_scores_TK, num_tokens,
    factor, NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr, NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr, MEMBERS_PADDED: tl.constexpr, KEPT_GROUPS: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    MEMBERS: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    WIDTH: tl.constexpr = GROUPS_PADDED * MEMBERS_PADDED
    # Places are counted from the tile's first token, in 32 bits: there are many, and they are kept in registers.
    tile = tl.program_id(0).to(tl.int64)
    tokens_left = num_tokens - tile * TILE
    logits_TE += tile * TILE * NUM_EXPERTS
    experts_TK += tile * TILE * TOP_K
    weights_TK += tile * TILE * TOP_K
    ranks_TK += tile * TILE * TOP_K
    chosen_scores_TK += tile * TILE * TOP_K
    slot = tl.arange(0, WIDTH)
    expert = slot // MEMBERS_PADDED * MEMBERS + slot % MEMBERS_PADDED
    real = (slot // MEMBERS_PADDED < NUM_GROUPS) & (slot % MEMBERS_PADDED < MEMBERS)
    choice = tl.arange(0, CHOICES)
    counts = tl.zeros((WIDTH,), tl.int32)
    sums = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, TILE, AT_ONCE):
        token = start + tl.arange(0, AT_ONCE)
        inside = token < tokens_left
        place = token[:, None] * NUM_EXPERTS + expert[None, :]
        logits = tl.load(logits_TE + place, mask=inside[:, None] & real[None, :], other=0.0)
        scores = _scores(logits, real, SOFTMAX)
        values = scores
        if bias_E is not None:
            values = scores + tl.load(bias_E + expert, mask=real, other=0.0)[None, :]
        values = tl.where(real[None, :], _integers(values), TAKEN)
        if KEPT_GROUPS < NUM_GROUPS:
            values = _leave_out_groups(values, NUM_GROUPS, MEMBERS, GROUPS_PADDED, MEMBERS_PADDED, KEPT_GROUPS)
        slots = tl.zeros((AT_ONCE, CHOICES), tl.int32)
        for k in tl.static_range(TOP_K):
            best = tl.argmax(values, 1)
            values = tl.where(slot[None, :] == best[:, None], TAKEN, values)
            slots = tl.where(choice[None, :] == k, best[:, None], slots)
        taken = ((values == TAKEN) & real[None, :] & inside[:, None]).to(tl.int32)
        earlier = tl.cumsum(taken, 0) - taken + counts[None, :]
        counts += tl.sum(taken, 0)
        shares = scores / (tl.sum(scores, 1) + 1e-20)[:, None]
        sums += tl.sum(tl.where(inside[:, None], shares, 0.0), 0)

        chosen = tl.gather(scores, slots, 1)
        weights = chosen
        if NORMALIZE:
            total = tl.sum(tl.where(choice[None, :] < TOP_K, chosen, 0.0), 1) + 1e-20
            weights = tl.div_rn(chosen, total[:, None])
        place = token[:, None] * TOP_K + choice[None, :]
        stored = inside[:, None] & (choice < TOP_K)[None, :]
        experts = slots // MEMBERS_PADDED * MEMBERS + slots % MEMBERS_PADDED
        tl.store(experts_TK + place, experts.to(tl.int64), mask=stored)
        tl.store(weights_TK + place, weights * factor, mask=stored)
        tl.store(ranks_TK + place, tl.gather(earlier, slots, 1).to(tl.int64), mask=stored)
        tl.store(chosen_scores_TK + place, chosen, mask=stored)
    tl.store(tile_counts_NE + tile * NUM_EXPERTS + expert, counts, mask=real)
    tl.store(tile_sums_NE + tile * NUM_EXPERTS + expert, sums, mask=real)


def route_backward(
    grad_weights_TK: Tensor,
    experts_TK: Tensor,
    chosen_scores_TK: Tensor,
    num_experts: int,
    options: RouteOptions,
    logits_TE: Tensor | None = None,
    grad_sums_E: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, ``[T, E]`` float32.

    From the K saved scores alone for sigmoid, and for softmax with normalised weights, which do not depend on the
    experts that were not chosen. Weights of a softmax that are not normalised, and the sums of scores, depend on all
    scores: they are made again from the logits.

    Args:
        grad_weights_TK: ``[T, K]`` float32, contiguous.
        experts_TK: ``[T, K]`` int64, contiguous.
        chosen_scores_TK: ``[T, K]`` float32, contiguous.
        num_experts: E.
        options: those of the forward.
        logits_TE: ``[T, E]`` float32, contiguous; wanted where ``options.needs_logits``, or for ``grad_sums_E``.
        grad_sums_E: ``[E]`` float32, contiguous, the gradient of the sums of scores.
    """
    num_tokens, top_k = experts_TK.shape
    softmax = options.score_function == "softmax"
    grad_logits = grad_weights_TK.new_empty(num_tokens, num_experts)
    dense = grad_sums_E is not None or options.needs_logits
    assert not dense or logits_TE is not None, "this gradient needs the logits"
    if num_tokens == 0:
        return grad_logits
    width = padded(num_experts)
    at_once = max(SCORES_AT_ONCE_BACKWARD // width, 1)
    arguments = (
        grad_weights_TK, experts_TK, chosen_scores_TK, logits_TE if dense else None, grad_sums_E, grad_logits,
        num_tokens, float(options.factor), num_experts, width, top_k, softmax, options.normalize, at_once,
    )  # fmt: skip
    launch(_route_backward, (pieces(num_tokens, at_once),), arguments, num_warps=8)
    return grad_logits


@triton.jit
def _route_backward(
    grad_weights_TK, experts_TK, chosen_scores_TK, logits_TE, grad_sums_E, grad_logits_TE, num_tokens, factor,
    NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = token < num_tokens
    expert = tl.arange(0, WIDTH)
    total = tl.full((AT_ONCE,), 1e-20, tl.float32)
    weighted = tl.zeros((AT_ONCE,), tl.float32)
    if NORMALIZE:
        for k in tl.static_range(TOP_K):
            score = tl.load(chosen_scores_TK + token * TOP_K + k, mask=inside, other=1.0)
            total += score
            weighted += score * tl.load(grad_weights_TK + token * TOP_K + k, mask=inside, other=0.0)
    # The gradient of each chosen score stands at its expert, and so does the score where no others are needed.
    grad_scores = tl.zeros((AT_ONCE, WIDTH), tl.float32)
    scores = tl.zeros((AT_ONCE, WIDTH), tl.float32)
    for k in tl.static_range(TOP_K):
        grad = factor * tl.load(grad_weights_TK + token * TOP_K + k, mask=inside, other=0.0)
        if NORMALIZE:
            grad = (grad - factor * weighted / total) / total
        here = expert[None, :] == tl.load(experts_TK + token * TOP_K + k, mask=inside, other=0)[:, None]
        grad_scores = tl.where(here, grad[:, None], grad_scores)
        if logits_TE is None:
            score = tl.load(chosen_scores_TK + token * TOP_K + k, mask=inside, other=0.0)
            scores = tl.where(here, score[:, None], scores)
    real = expert < NUM_EXPERTS
    place = token[:, None] * NUM_EXPERTS + expert[None, :]
    stored = inside[:, None] & real[None, :]
    if logits_TE is not None:
        scores = _scores(tl.load(logits_TE + place, mask=stored, other=0.0), real, SOFTMAX)
    if grad_sums_E is not None:
        grad_sums = tl.load(grad_sums_E + expert, mask=real, other=0.0)[None, :]
        sum_of_scores = tl.sum(scores, 1)[:, None] + 1e-20
        mean = tl.sum(grad_sums * scores, 1)[:, None] / sum_of_scores
        grad_scores += (grad_sums - mean) / sum_of_scores
    if SOFTMAX:
        grad_logits = scores * (grad_scores - tl.sum(grad_scores * scores, 1)[:, None])
    else:
        grad_logits = grad_scores * scores * (1.0 - scores)
    tl.store(grad_logits_TE + place, grad_logits, mask=stored)
