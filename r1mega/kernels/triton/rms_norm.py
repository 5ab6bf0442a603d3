"""Root-mean-square normalisation of rows and its gradients; a row stays in one program's registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega.kernels.triton.compat import cast, launch, padded, pieces

WIDEST = 16384
# Of the backward; each adds its rows up for the weight's gradient. A fixed number, so that every GPU adds alike.
PROGRAMS = 512


def rms_norm(input_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result ``[T, H]``, and ``1 / sqrt(mean(input**2) + eps)`` of each row, ``[T]`` float32.

    Args:
        input_TH: ``[T, H]``; elements of a row stand together.
        weight_H: ``[H]``, contiguous.
        eps: added to the mean square.
    """
    num_rows, width = input_TH.shape
    out = torch.empty((num_rows, width), dtype=input_TH.dtype, device=input_TH.device)
    scale = out.new_empty(num_rows, dtype=torch.float32)
    if out.numel():
        arguments = input_TH, weight_H, out, scale, input_TH.stride(0), width, eps, padded(width)
        launch(_rms_norm, (num_rows,), arguments, num_warps=_warps(width))
    return out, scale


@triton.jit
def _rms_norm(input_TH, weight_H, out_TH, scale_T, stride, width, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    x = tl.load(input_TH + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_H + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    normed = cast(x * scale, out_TH.dtype.element_ty).to(tl.float32)
    tl.store(out_TH + row * width + column, cast(normed * weight, out_TH.dtype.element_ty), mask=inside)
    tl.store(scale_T + row, scale)


def rms_norm_backward(grad_TH: Tensor, input_TH: Tensor, weight_H: Tensor, scale_T: Tensor) -> tuple[Tensor, Tensor]:
    """The input's gradient ``[T, H]``, and rows ``[P, H]`` float32 whose sum is the weight's.

    Args:
        grad_TH: ``[T, H]``, contiguous, the gradient of the result.
        input_TH: ``[T, H]``; elements of a row stand together.
        weight_H: ``[H]``, contiguous.
        scale_T: ``[T]`` float32, from :func:`rms_norm`.
    """
    num_rows, width = input_TH.shape
    grad_input = torch.empty_like(grad_TH)
    rows_of_program = max(pieces(num_rows, PROGRAMS), 1)
    programs = pieces(num_rows, rows_of_program)
    partial = grad_TH.new_empty(programs, width, dtype=torch.float32)
    if grad_TH.numel():
        arguments = (
            grad_TH, input_TH, weight_H, scale_T, grad_input, partial, input_TH.stride(0), num_rows, width,
            rows_of_program, padded(width),
        )  # fmt: skip
        launch(_rms_norm_backward, (programs,), arguments, num_warps=_warps(width))
    return grad_input, partial


@triton.jit
def _rms_norm_backward(
    grad_TH, input_TH, weight_H, scale_T, grad_input_TH, partial_PH, stride, num_rows, width, rows_of_program,
    WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    weight = tl.load(weight_H + column, mask=inside, other=0.0).to(tl.float32)
    products = tl.zeros((WIDTH,), tl.float32)
    for index in range(0, rows_of_program):
        row = program * rows_of_program + index
        here = column < tl.where(row < num_rows, width, 0)
        scale = tl.load(scale_T + row, mask=row < num_rows, other=0.0)
        normed = tl.load(input_TH + row * stride + column, mask=here, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_TH + row * width + column, mask=here, other=0.0).to(tl.float32)
        products += grad * normed
        grad = grad * weight
        grad_input = (grad - normed * (tl.sum(grad * normed, 0) / width)) * scale
        tl.store(grad_input_TH + row * width + column, cast(grad_input, grad_input_TH.dtype.element_ty), mask=here)
    tl.store(partial_PH + program * width + column, products, mask=inside)


def _warps(width: int) -> int:
    return min(max(padded(width) // 512, 4), 16)
