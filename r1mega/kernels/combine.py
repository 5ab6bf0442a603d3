"""``combine``: the sum of each token's routed rows, each times its weight where weights are given.

r1mega's own experts apply the router's weight before their second product (``r1mega.kernels.swiglu``), which needs no
copy of their output for the weight's gradient. Other stacks weight the rows here.
Shapes: T tokens, K choices a token, H hidden, R routed rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.kernels import check, native, triton
from r1mega.kernels.fake import is_fake
from r1mega.kernels.permute import RowMap, _copy_weights, copy_rows, sum_rows


def combine(rows_RH: Tensor, row_map: RowMap, weights_TK: Tensor | None = None) -> Tensor:
    """Sum the routed rows of each token; a token without rows gets zeros.

    Args:
        rows_RH: ``[R, H]``.
        row_map: from ``r1mega.kernels.permute.permute``.
        weights_TK: ``[T, K]``, what each row is multiplied with; that of a dropped choice is not used and its gradient
            is 0. In a wider type than the rows, sums are made in that type.

    Returns:
        ``[T, H]`` in the type of the rows.

    Raises:
        ValueError: for rows or weights that are not those of the map.
    """
    check.matrix("rows_RH", rows_RH)
    device = row_map.row_of_choice.device
    check.shaped("rows_RH", rows_RH, (row_map.num_rows, rows_RH.shape[1]), device)
    if weights_TK is not None:
        check.shaped("weights_TK", weights_TK, row_map.row_of_choice.shape, device)
    if weights_TK is None:
        return _Combine.apply(rows_RH, row_map)
    return _WeightedCombine.apply(rows_RH, weights_TK, row_map)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, row_map):
        ctx.row_map = row_map
        return sum_rows(rows_RH, row_map)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        return copy_rows(grad_TH, ctx.row_map), None


class _WeightedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RH, weights_TK, row_map):
        ctx.save_for_backward(rows_RH, weights_TK)
        ctx.row_map = row_map
        return sum_rows(rows_RH, row_map, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        rows_RH, weights_TK = (tensor.contiguous() for tensor in ctx.saved_tensors)
        row_map = ctx.row_map
        if native.takes(grad_TH, rows_RH, weights_TK):
            grad_rows = native.empty(rows_RH.shape, rows_RH)
            if row_map.padded:
                grad_rows.zero_()
            given = grad_TH.contiguous(), rows_RH, row_map.row_of_choice, weights_TK
            made = grad_rows, torch.empty_like(weights_TK)
            native.call("sum_rows_backward", rows_RH, *given, *made, *weights_TK.shape, *rows_RH.shape)
            return *made, None
        if is_fake(rows_RH):
            return torch.empty_like(rows_RH), torch.empty_like(weights_TK), None
        if triton.takes(grad_TH, rows_RH, weights_TK):
            from r1mega.kernels.triton.combine import weighted_backward

            given = grad_TH.contiguous(), rows_RH, row_map.row_of_choice.contiguous(), weights_TK
            return *weighted_backward(*given, row_map.padded), None
        return *reference_weighted_backward(grad_TH, rows_RH, weights_TK, row_map), None


def reference_weighted_backward(
    grad_TH: Tensor, rows_RH: Tensor, weights_TK: Tensor, row_map: RowMap
) -> tuple[Tensor, Tensor]:
    """Gradients of rows ``[R, H]``: weight times the token's gradient; and of weights ``[T, K]``: their product."""
    wide = torch.promote_types(rows_RH.dtype, weights_TK.dtype)
    grad_RH = copy_rows(grad_TH, row_map).to(wide)
    grad_R = torch.linalg.vecdot(grad_RH, rows_RH.to(wide)).to(weights_TK.dtype)
    if row_map.dropped:
        grad_R = torch.cat([grad_R, grad_R.new_zeros(1)])  # which -1 points at
    grad_rows = grad_RH * _copy_weights(weights_TK, row_map).to(wide).unsqueeze(1)
    return grad_rows.to(rows_RH.dtype), grad_R[row_map.row_of_choice]
