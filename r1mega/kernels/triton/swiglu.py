"""``silu(gate) * up``, times one weight a row or none, and its gradients; computed in float32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega.kernels.triton.compat import cast, launch, padded, pieces, silu

BLOCK = 1024


def swiglu(gate_RF: Tensor, up_RF: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * weight[:, None]``, ``[R, F]``.

    Args:
        gate_RF: ``[R, F]``; elements of a row stand together.
        up_RF: ``[R, F]`` with the strides of ``gate_RF``.
        weight_R: ``[R]``, contiguous.
    """
    num_rows, width = gate_RF.shape
    out = torch.empty((num_rows, width), dtype=gate_RF.dtype, device=gate_RF.device)
    if out.numel() == 0:
        return out
    block = min(padded(width), BLOCK)
    arguments = gate_RF, up_RF, weight_R, out, gate_RF.stride(0), width, block
    launch(_swiglu, (num_rows, pieces(width, block)), arguments, num_warps=4)
    return out


@triton.jit
def _swiglu(gate_RF, up_RF, weight_R, out_RF, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_RF + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_RF + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    result = silu(gate) * up
    if weight_R is not None:
        result = result * tl.load(weight_R + row).to(tl.float32)
    tl.store(out_RF + row * width + column, cast(result, out_RF.dtype.element_ty), mask=inside)


def swiglu_backward(
    grad_RF: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    grad_gate_RF: Tensor,
    grad_up_RF: Tensor,
    weight_R: Tensor | None = None,
) -> Tensor | None:
    """All gradients in one pass. Fills ``grad_gate_RF`` and ``grad_up_RF`` and returns the weight's ``[R]``, if any.

    Args:
        grad_RF: ``[R, F]``, contiguous, the gradient of the result.
        gate_RF: ``[R, F]``; elements of a row stand together.
        up_RF: ``[R, F]`` with the strides of ``gate_RF``, as have both gradients.
        grad_gate_RF: ``[R, F]``, to be filled.
        grad_up_RF: ``[R, F]``, to be filled.
        weight_R: ``[R]``, contiguous.
    """
    num_rows, width = gate_RF.shape
    grad_weight = None if weight_R is None else torch.zeros_like(weight_R, memory_format=torch.contiguous_format)
    if gate_RF.numel() == 0:
        return grad_weight
    block = min(padded(width), BLOCK)
    arguments = (
        grad_RF, gate_RF, up_RF, weight_R, grad_gate_RF, grad_up_RF, grad_weight, gate_RF.stride(0), width, block,
    )  # fmt: skip
    launch(_swiglu_backward, (num_rows,), arguments, num_warps=4)
    return grad_weight


@triton.jit
def _swiglu_backward(
    grad_RF, gate_RF, up_RF, weight_R, grad_gate_RF, grad_up_RF, grad_weight_R, stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        grad = tl.load(grad_RF + row * width + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_RF + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_RF + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        if weight_R is not None:
            products += grad * (gate * sigmoid) * up
            grad = grad * tl.load(weight_R + row).to(tl.float32)
        grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        grad_up = grad * gate * sigmoid
        tl.store(grad_gate_RF + row * stride + column, cast(grad_gate, grad_gate_RF.dtype.element_ty), mask=inside)
        tl.store(grad_up_RF + row * stride + column, cast(grad_up, grad_up_RF.dtype.element_ty), mask=inside)
    if weight_R is not None:
        tl.store(grad_weight_R + row, cast(tl.sum(products, 0), grad_weight_R.dtype.element_ty))
