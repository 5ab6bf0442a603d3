"""Moving token rows to routed rows and back: ``permute`` and ``combine``, each the other's backward.

A token goes to up to K experts, so R routed rows come from T tokens. :class:`RowMap` holds the map both ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class RowMap:
    """Which token each routed row copies, and which routed rows each token owns.

    Args:
        token_of_row: ``[R]`` int64.
        rows_by_token: ``[kept]`` int64, the routed rows of token 0, then those of token 1, ...; no padding rows.
        first_of_token: ``[T]`` int64, where each token's rows begin in ``rows_by_token``.
    """

    token_of_row: Tensor
    rows_by_token: Tensor
    first_of_token: Tensor


def permute(input_TH: Tensor, row_map: RowMap) -> Tensor:
    """Copy each token to its routed rows: ``[T, H] -> [R, H]``."""
    return _Permute.apply(input_TH, row_map)


def combine(rows_RH: Tensor, row_map: RowMap) -> Tensor:
    """Sum the routed rows of each token: ``[R, H] -> [T, H]``; a token without rows gets zeros."""
    return _Combine.apply(rows_RH, row_map)


def _copy_rows(input_TH: Tensor, row_map: RowMap) -> Tensor:
    return input_TH.index_select(0, row_map.token_of_row)


def _sum_rows(rows_RH: Tensor, row_map: RowMap) -> Tensor:
    # embedding_bag sums without writing the gathered rows; it wants one row at least.
    if rows_RH.shape[0] == 0:
        return rows_RH.new_zeros(row_map.first_of_token.shape[0], rows_RH.shape[1])
    return F.embedding_bag(row_map.rows_by_token, rows_RH, row_map.first_of_token, mode="sum")


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TH, row_map):
        ctx.row_map = row_map
        return _copy_rows(input_TH, row_map)

    @staticmethod
    def backward(ctx, grad_RH):
        return _sum_rows(grad_RH.contiguous(), ctx.row_map), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, row_map):
        ctx.row_map = row_map
        return _sum_rows(rows_RH, row_map)

    @staticmethod
    def backward(ctx, grad_TH):
        return _copy_rows(grad_TH, ctx.row_map), None


class _Reorder(torch.autograd.Function):
    """Rows in another order; the backward puts them back, without the scatter of ``index_select``'s own."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.inverse), None, None


def reorder(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``rows[order]`` for a permutation ``order`` of the rows whose inverse is ``inverse``."""
    return _Reorder.apply(rows, order, inverse)


def map_rows(expert_of_slot: Tensor, num_experts: int, may_drop: bool = False) -> tuple[Tensor, Tensor, RowMap]:
    """Sort the chosen (token, expert) pairs by expert; within an expert by token.

    Args:
        expert_of_slot: ``[T, K]`` int64, the experts of each token.
        num_experts: E.
        may_drop: whether ``num_experts`` in ``expert_of_slot`` marks dropped choices.

    Returns:
        ``slot_of_row [R]`` (index into the flattened ``[T*K]`` choices), ``counts [E]`` int64 and the row map.
    """
    num_tokens, top_k = expert_of_slot.shape
    flat = expert_of_slot.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts + 1)
    slot_of_row = flat.argsort(stable=True)
    num_slots = flat.shape[0]
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(num_slots, device=flat.device)
    if not may_drop:
        first = torch.arange(0, num_slots, top_k, device=flat.device)
        return slot_of_row, counts[:num_experts], RowMap(slot_of_row // top_k, row_of_slot, first)
    kept = flat < num_experts
    kept_of_token = kept.view(num_tokens, top_k).sum(1)
    slot_of_row = slot_of_row[: int(kept_of_token.sum())]
    first = kept_of_token.cumsum(0) - kept_of_token
    return slot_of_row, counts[:num_experts], RowMap(slot_of_row // top_k, row_of_slot[kept], first)


def pad_rows(weights_R: Tensor, counts_E: Tensor, row_map: RowMap, capacity: int) -> tuple[Tensor, Tensor, RowMap]:
    """Give each expert exactly ``capacity`` rows; the added ones copy token 0 with weight 0 and belong to no token.

    Weight 0 makes their results and all their gradients zero.

    Args:
        weights_R: ``[R]``.
        counts_E: ``[E]``, at most ``capacity`` each.
        row_map: of the R rows.
        capacity: rows of each expert.

    Returns:
        weights ``[E * capacity]``, counts ``[E]`` and the map of the padded rows.
    """
    num_experts = counts_E.shape[0]
    expert_of_row = torch.repeat_interleave(torch.arange(num_experts, device=counts_E.device), counts_E)
    first_of_expert = counts_E.cumsum(0) - counts_E
    rank_in_expert = torch.arange(expert_of_row.shape[0], device=counts_E.device) - first_of_expert[expert_of_row]
    padded_of_row = expert_of_row * capacity + rank_in_expert
    weights = weights_R.new_zeros(num_experts * capacity).index_copy(0, padded_of_row, weights_R)
    token_of_row = row_map.token_of_row.new_zeros(num_experts * capacity)
    token_of_row[padded_of_row] = row_map.token_of_row
    padded = RowMap(token_of_row, padded_of_row[row_map.rows_by_token], row_map.first_of_token)
    return weights, torch.full_like(counts_E, capacity), padded
