"""Sums of each token's routed rows, and copies of each token to its rows: each one the other's backward.

``row_of_choice_TK`` says which row each choice owns, -1 for a choice that was dropped. One program works on one token's
piece of a row, so nothing is added by two programs and every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega.kernels.triton.compat import cast, launch, padded, pieces

BLOCK = 1024
BLOCK_OF_ALL_CHOICES = 2048


def sum_rows(rows_RH: Tensor, row_of_choice_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """``[T, H]``: the sum of each token's rows, each times its weight; added in float32.

    Args:
        rows_RH: ``[R, H]``, contiguous.
        row_of_choice_TK: ``[T, K]`` int64, contiguous.
        weights_TK: ``[T, K]``, contiguous; that of a dropped choice is not used.
    """
    (num_tokens, top_k), width = row_of_choice_TK.shape, rows_RH.shape[1]
    out = rows_RH.new_empty(num_tokens, width)
    if out.numel() == 0:
        return out
    block = min(padded(width), BLOCK)
    arguments = rows_RH, row_of_choice_TK, weights_TK, out, width, top_k, block
    launch(_sum_rows, (num_tokens, pieces(width, block)), arguments, num_warps=4)
    return out


@triton.jit
def _sum_rows(rows_RH, row_of_choice_TK, weights_TK, out_TH, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_choice_TK + token * TOP_K + k)
        inside = column < tl.where(row >= 0, width, 0)
        values = tl.load(rows_RH + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if weights_TK is not None:
            weight = tl.load(weights_TK + token * TOP_K + k, mask=row >= 0, other=0.0).to(tl.float32)
            values = values * weight
        total += values
    tl.store(out_TH + token * width + column, cast(total, out_TH.dtype.element_ty), mask=column < width)


def copy_rows(input_TH: Tensor, row_of_choice_TK: Tensor, num_rows: int, padded_rows: bool = False) -> Tensor:
    """``[R, H]``: row ``row_of_choice[t, k]`` is row t of the input.

    Args:
        input_TH: ``[T, H]``, a row's numbers side by side; there may be gaps between rows.
        row_of_choice_TK: ``[T, K]`` int64, contiguous.
        num_rows: R.
        padded_rows: whether some rows belong to no choice; they become zero.
    """
    (num_tokens, top_k), width = row_of_choice_TK.shape, input_TH.shape[1]
    make = input_TH.new_zeros if padded_rows else input_TH.new_empty
    out = make(num_rows, width)
    if out.numel() == 0 or num_tokens == 0:
        return out
    block = min(padded(width), BLOCK)
    arguments = input_TH, row_of_choice_TK, out, input_TH.stride(0), width, top_k, block
    launch(_copy_rows, (num_tokens, pieces(width, block)), arguments, num_warps=4)
    return out


@triton.jit
def _copy_rows(
    input_TH, row_of_choice_TK, rows_RH, input_step, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(input_TH + token * input_step + column, mask=column < width)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_of_choice_TK + token * TOP_K + k)
        tl.store(rows_RH + row * width + column, values, mask=column < tl.where(row >= 0, width, 0))


def weighted_backward(
    grad_TH: Tensor, rows_RH: Tensor, row_of_choice_TK: Tensor, weights_TK: Tensor, padded_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of a weighted :func:`sum_rows` in one pass over rows and ``grad_TH``.

    Args:
        grad_TH: ``[T, H]``, contiguous, the gradient of the sums.
        rows_RH: ``[R, H]``, contiguous.
        row_of_choice_TK: ``[T, K]`` int64, contiguous.
        weights_TK: ``[T, K]``, contiguous.
        padded_rows: whether some rows belong to no choice; their gradient is zero.

    Returns:
        ``weight * grad`` of each row ``[R, H]``, and ``<grad, row>`` of each choice ``[T, K]`` (0 where dropped).
    """
    (num_tokens, top_k), width = row_of_choice_TK.shape, rows_RH.shape[1]
    grad_rows = torch.zeros_like(rows_RH) if padded_rows else torch.empty_like(rows_RH)
    grad_weights = torch.empty_like(weights_TK)
    if width == 0 or num_tokens == 0:
        return grad_rows, grad_weights.zero_()
    choices = padded(top_k)
    block = min(padded(width), max(BLOCK_OF_ALL_CHOICES // choices, 1))
    arguments = grad_TH, rows_RH, row_of_choice_TK, weights_TK, grad_rows, grad_weights, width, top_k, choices, block
    launch(_weighted_backward, (num_tokens,), arguments, num_warps=4)
    return grad_rows, grad_weights


@triton.jit
def _weighted_backward(
    grad_TH, rows_RH, row_of_choice_TK, weights_TK, grad_rows_RH, grad_weights_TK, width,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, CHOICES)
    choice = token * TOP_K + k
    row = tl.load(row_of_choice_TK + choice, mask=k < TOP_K, other=-1)
    weight = tl.load(weights_TK + choice, mask=row >= 0, other=0.0).to(tl.float32)
    products = tl.zeros((CHOICES, BLOCK), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_TH + token * width + column, mask=column < width, other=0.0).to(tl.float32)
        place = row[:, None] * width + column[None, :]
        inside = (row >= 0)[:, None] & (column < width)[None, :]
        values = tl.load(rows_RH + place, mask=inside, other=0.0).to(tl.float32)
        products += values * grad[None, :]
        grad_values = cast(weight[:, None] * grad[None, :], grad_rows_RH.dtype.element_ty)
        tl.store(grad_rows_RH + place, grad_values, mask=inside)
    grad_weight = tl.sum(products, 1)
    tl.store(grad_weights_TK + choice, cast(grad_weight, grad_weights_TK.dtype.element_ty), mask=k < TOP_K)
