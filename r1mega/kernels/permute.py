"""Copying token rows to expert order. Its backward sums the rows of each token, as ``combine`` does.

The rows of an expert stand together, experts in order, in the order of the tokens. The row of a choice is ``first row
of its tile and expert + rank`` (``r1mega.kernels.route``): no sort, and the kernels compute it inside the copy.
Shapes: T tokens, K choices a token, E experts, H hidden, R routed rows, N tiles of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.kernels import check, cuda, native, triton
from r1mega.kernels.fake import is_fake, on_host
from r1mega.kernels.route import places
from r1mega.kernels.scan import scan


@dataclass
class RowMap:
    """Which routed row each choice owns.

    Args:
        row_of_choice: ``[T, K]`` int64; -1 for a dropped choice.
        num_rows: R.
        dropped: whether some choices may own no row.
        padded: whether some rows may belong to no choice; they are zero, as is their weight.

    Raises:
        ValueError: for a ``row_of_choice`` of another type or shape, or that is not dense.
    """

    row_of_choice: Tensor
    num_rows: int
    dropped: bool = False
    padded: bool = False

    def __post_init__(self) -> None:
        rows = self.row_of_choice
        if rows.dtype != torch.int64 or rows.dim() != 2 or not rows.is_contiguous():
            raise ValueError(f"row_of_choice: must be dense int64 of shape [T, K]; it has {rows.dtype}, {rows.shape}")


def permute(
    input_TH: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    ranks_TK: Tensor,
    counts_E: Tensor,
    may_drop: bool = False,
    capacity: int | None = None,
    first_row_NE: Tensor | None = None,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor, RowMap]:
    """Copy each token and its weights to its routed rows.

    Args:
        input_TH: ``[T, H]``; there may be gaps between its rows, there are none between those of the result.
        weights_TK: ``[T, K]``.
        experts_TK: ``[T, K]`` integers; E marks a dropped choice.
        ranks_TK: ``[T, K]`` integers, of each choice among those of its tile and expert.
        counts_E: ``[E]`` integers, choices of each expert.
        may_drop: whether there may be dropped choices.
        capacity: give each expert exactly this many rows, at least its count; the added ones are zero.
        first_row_NE: ``[N, E]`` integers, what :func:`r1mega.kernels.route.route` gave with these ranks; None where
            ranks were counted over all tokens, as :func:`r1mega.kernels.route.rank_choices` does.
        num_rows: R where choices may be dropped, if the caller knows it. By default it is the number of kept choices;
            but on a GPU, for which nobody waits, it is ``T K``, and the rows after those of kept choices are zero, as
            are their weights.

    Returns:
        rows ``[R, H]``, their weights ``[R]`` and the map that :func:`combine` takes.

    Raises:
        ValueError: for shapes, types or devices that do not fit; on the CPU for a capacity that is too small; and where
            the C++ kernel runs, for experts and ranks that lead to no row.
    """
    check.matrix("input_TH", input_TH)
    check.matrix("experts_TK", experts_TK)
    device, choices = input_TH.device, (input_TH.shape[0], experts_TK.shape[1])
    experts_TK = check.integers("experts_TK", experts_TK, choices, device).contiguous()
    ranks_TK = check.integers("ranks_TK", ranks_TK, choices, device).contiguous()
    check.shaped("weights_TK", weights_TK, choices, device)
    check.vector("counts_E", counts_E)
    counts_E = check.integers("counts_E", counts_E, counts_E.shape, device)
    if first_row_NE is None:
        first_row_NE = scan(counts_E.unsqueeze(0))[0]
    else:
        tiles = {1, -(-input_TH.shape[0] // cuda.TILE_TOKENS)}
        check.matrix("first_row_NE", first_row_NE)
        if first_row_NE.shape[0] not in tiles:
            raise ValueError(f"first_row_NE: has {first_row_NE.shape[0]} tiles; these tokens have {max(tiles)}")
        shape = first_row_NE.shape[0], counts_E.shape[0]
        first_row_NE = check.integers("first_row_NE", first_row_NE, shape, device)
    first_row_NE = first_row_NE.contiguous()
    padded = capacity is not None or (may_drop and num_rows is None and not on_host(counts_E))
    if num_rows is None:
        num_rows = experts_TK.numel() if padded or not may_drop else int(counts_E.sum())
    if capacity is not None:
        if on_host(counts_E) and counts_E.numel() and int(counts_E.max()) > capacity:
            raise ValueError(f"capacity={capacity}: one expert has {int(counts_E.max())} rows")
        num_rows = counts_E.shape[0] * capacity
        first_of_expert = torch.arange(counts_E.shape[0], device=counts_E.device) * capacity
        first_row_NE = first_row_NE - first_row_NE[0] + first_of_expert
    row_map = RowMap(torch.empty_like(experts_TK), num_rows, may_drop, padded)
    rows, weights = _Permute.apply(input_TH, weights_TK, experts_TK, ranks_TK, first_row_NE, row_map)
    return rows, weights, row_map


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TH, weights_TK, experts_TK, ranks_TK, first_row_NE, row_map):
        ctx.row_map = row_map
        ctx.set_materialize_grads(False)
        rows = _rows_of(_without_gaps_in_rows(input_TH), experts_TK, ranks_TK, first_row_NE, row_map)
        return rows, _copy_weights(weights_TK, row_map)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RH, grad_R):
        row_map = ctx.row_map
        grad_input = None if grad_RH is None else sum_rows(grad_RH, row_map)
        grad_weights = None
        if grad_R is not None:
            rows = row_map.row_of_choice
            if row_map.dropped:
                grad_R = torch.cat([grad_R, grad_R.new_zeros(1)])  # which -1 points at
            grad_weights = grad_R[rows]
        return grad_input, grad_weights, None, None, None, None


def _rows_of(input_TH: Tensor, experts_TK: Tensor, ranks_TK: Tensor, first_row_NE: Tensor, row_map: RowMap) -> Tensor:
    """Copy the rows, and fill ``row_map.row_of_choice``."""
    num_tiles, num_experts = first_row_NE.shape
    if native.takes(input_TH) and num_tiles == 1:
        out, *sizes = _rows_for(input_TH, row_map)
        native.call(
            "permute", None, input_TH, experts_TK, ranks_TK, first_row_NE, row_map.row_of_choice, out,
            experts_TK.shape[0], num_experts, experts_TK.shape[1], row_map.dropped, row_map.num_rows, *sizes,
        )  # fmt: skip
        return out
    on_gpu = None
    if cuda.takes_rows(input_TH, experts_TK):
        on_gpu = cuda.permute
    elif triton.takes(input_TH):
        from r1mega.kernels.triton.permute import permute as on_gpu
    if on_gpu is not None:
        rows, row_map.row_of_choice = on_gpu(
            input_TH, experts_TK, ranks_TK, first_row_NE, row_map.num_rows, row_map.padded
        )
        return rows
    find_rows(experts_TK, ranks_TK, first_row_NE, row_map)
    return copy_rows(input_TH, row_map)


def find_rows(experts_TK: Tensor, ranks_TK: Tensor, first_row_NE: Tensor, row_map: RowMap) -> None:
    """Fill ``row_map.row_of_choice`` as the kernels do."""
    first_rows_TK = first_row_NE.flatten()[places(experts_TK, first_row_NE.shape)]
    rows = torch.add(first_rows_TK, ranks_TK, out=row_map.row_of_choice)
    if row_map.dropped:
        rows.masked_fill_(experts_TK == first_row_NE.shape[1], -1)


def _copy_weights(weights_TK: Tensor, row_map: RowMap) -> Tensor:
    rows, weights = row_map.row_of_choice.flatten(), weights_TK.detach().flatten()
    if row_map.dropped:
        rows = rows.masked_fill(rows < 0, row_map.num_rows)  # one row more, where they meet
    return weights.new_zeros(row_map.num_rows + row_map.dropped).index_copy_(0, rows, weights)[: row_map.num_rows]


def _rows_for(input_TH: Tensor, row_map: RowMap) -> tuple[Tensor, int, int, bool]:
    """The rows to be filled, bytes from one row of the input to the next, bytes of a row, and whether they stream."""
    width, size = input_TH.shape[1], input_TH.element_size()
    out = native.empty((row_map.num_rows, width), input_TH)
    streams = native.streams(out, width * size)
    return out.zero_() if row_map.padded else out, input_TH.stride(0) * size, width * size, streams


def _without_gaps_in_rows(input_TH: Tensor) -> Tensor:
    """Itself where the numbers of each row lie side by side, as the kernels want them; else a copy."""
    return input_TH if native.row_stride(input_TH) is not None else input_TH.contiguous()


def copy_rows(input_TH: Tensor, row_map: RowMap) -> Tensor:
    """The rows ``[R, H]`` of tokens ``[T, H]``, as :func:`permute` gave them; not differentiable.

    Raises:
        ValueError: for tokens that are not those of the map.
    """
    rows = row_map.row_of_choice
    check.matrix("input_TH", input_TH)
    check.shaped("input_TH", input_TH, (rows.shape[0], input_TH.shape[1]), rows.device)
    input_TH = _without_gaps_in_rows(input_TH)
    if native.takes(input_TH):
        out, *sizes = _rows_for(input_TH, row_map)
        native.call("copy_rows", None, input_TH, rows, out, *rows.shape, row_map.num_rows, *sizes)
        return out
    if is_fake(input_TH):
        return input_TH.new_empty(row_map.num_rows, input_TH.shape[1])
    if cuda.takes_rows(input_TH, rows):
        return cuda.copy_rows(input_TH, rows.contiguous(), row_map.num_rows, row_map.padded)
    if triton.takes(input_TH):
        from r1mega.kernels.triton.combine import copy_rows as by_triton

        return by_triton(input_TH, rows.contiguous(), row_map.num_rows, row_map.padded)
    return reference_copy_rows(input_TH, row_map)


def reference_copy_rows(input_TH: Tensor, row_map: RowMap) -> Tensor:
    """Row ``row_of_choice[t, k]`` of the result is row t of the input; rows that no choice owns are zero."""
    rows = row_map.row_of_choice.flatten()
    tokens = torch.arange(input_TH.shape[0], device=rows.device).repeat_interleave(row_map.row_of_choice.shape[1])
    num_rows = row_map.num_rows
    if row_map.dropped:
        rows = rows.masked_fill(rows < 0, num_rows)  # one row more, where they meet
    if input_TH.shape[0] == 0:
        return input_TH.new_zeros(num_rows, input_TH.shape[1])
    token_of_row = tokens.new_full((num_rows + row_map.dropped,), -1 if row_map.padded else 0)
    token_of_row[rows] = tokens
    token_of_row = token_of_row[:num_rows]
    if not row_map.padded:
        return input_TH.index_select(0, token_of_row)
    copied = input_TH.index_select(0, token_of_row.clamp(min=0))
    return copied.index_fill_(0, (token_of_row < 0).nonzero().flatten(), 0)


def sum_rows(rows_RH: Tensor, row_map: RowMap, weights_TK: Tensor | None = None) -> Tensor:
    """``[T, H]``: the sum of the rows that each token's choices own, each times its weight; not differentiable."""
    num_tokens, top_k = row_map.row_of_choice.shape
    if native.takes(rows_RH, weights_TK):
        rows_RH, weights_TK = rows_RH.contiguous(), None if weights_TK is None else weights_TK.contiguous()
        out = native.empty((num_tokens, rows_RH.shape[1]), rows_RH)
        given = rows_RH, row_map.row_of_choice, weights_TK, out
        native.call("sum_rows", rows_RH, *given, num_tokens, top_k, *rows_RH.shape)
        return out
    if is_fake(rows_RH):
        return rows_RH.new_empty(num_tokens, rows_RH.shape[1])
    if triton.takes(rows_RH, weights_TK):
        from r1mega.kernels.triton.combine import sum_rows as by_triton

        weights_TK = None if weights_TK is None else weights_TK.contiguous()
        return by_triton(rows_RH.contiguous(), row_map.row_of_choice.contiguous(), weights_TK)
    return reference_sum_rows(rows_RH, row_map, weights_TK)


def reference_sum_rows(rows_RH: Tensor, row_map: RowMap, weights_TK: Tensor | None = None) -> Tensor:
    """:func:`sum_rows` in PyTorch's operations; in the wider type of the two where there are weights."""
    rows, dtype = row_map.row_of_choice, rows_RH.dtype
    if weights_TK is not None:
        wide = torch.promote_types(dtype, weights_TK.dtype)
        rows_RH, weights_TK = rows_RH.to(wide), weights_TK.to(wide)
    # embedding_bag sums without writing the gathered rows; it wants one row at least.
    if rows_RH.shape[0] == 0 or rows.numel() == 0:
        return rows_RH.new_zeros(rows.shape[0], rows_RH.shape[1], dtype=dtype)
    rows_RH = rows_RH.contiguous()
    if not row_map.dropped:
        return F.embedding_bag(rows, rows_RH, mode="sum", per_sample_weights=weights_TK).to(dtype)
    kept = rows >= 0
    first = kept.sum(1).cumsum(0) - kept.sum(1)
    weights = None if weights_TK is None else weights_TK[kept]
    return F.embedding_bag(rows[kept], rows_RH, first, mode="sum", per_sample_weights=weights).to(dtype)
