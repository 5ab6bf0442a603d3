"""``silu(gate) * up``; and from one tensor, times one weight a row (the router's weight of a routed row)."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.kernels import check, native, triton


def swiglu(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """``silu(gate) * up``, all ``[R, F]``. Raises ValueError where they are not."""
    check.shaped("up_RF", up_RF, gate_RF.shape, gate_RF.device)
    return _SwiGLU.apply(gate_RF, up_RF)


def weighted_swiglu(gate_up_RF: Tensor, weight_R: Tensor) -> Tensor:
    """``silu(gate) * up * weight[:, None]``.

    The router's weight is applied here and not to the expert's output, so that its gradient needs no copy of that
    output: ``dL/dweight = <dL/d(result), silu(gate) * up>`` (SonicMoE).

    Args:
        gate_up_RF: ``[R, 2 F]``, gate first.
        weight_R: ``[R]``, float32 or wider.

    Returns:
        ``[R, F]`` in the dtype of ``gate_up_RF``.

    Raises:
        ValueError: for shapes or devices that do not fit.
    """
    check.matrix("gate_up_RF", gate_up_RF)
    if gate_up_RF.shape[1] % 2:
        raise ValueError(f"gate_up_RF: must have an even number of columns, not {gate_up_RF.shape[1]}")
    check.shaped("weight_R", weight_R, gate_up_RF.shape[:1], gate_up_RF.device)
    return _WeightedSwiGLU.apply(gate_up_RF, weight_R)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up only; silu(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        straight = gate.is_contiguous() and up.is_contiguous()
        if straight and native.takes(gate, up):
            out = native.empty(gate.shape, gate)
            width = gate.shape[-1]
            native.call("swiglu", gate, gate, up, width, None, out, gate.numel() // max(width, 1), width)
            return out
        if straight and triton.takes(gate, up):
            return _triton().swiglu(_rows(gate), _rows(up)).view(gate.shape)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        straight = gate.is_contiguous() and up.is_contiguous()
        if straight and native.takes(gate, up, grad):
            grad_gate, grad_up = native.empty(gate.shape, gate), native.empty(up.shape, up)
            width = gate.shape[-1]
            native.call(
                "swiglu_backward", gate, grad.contiguous(), gate, up, width, None, grad_gate, grad_up, None,
                gate.numel() // max(width, 1), width,
            )  # fmt: skip
            return grad_gate, grad_up
        if straight and triton.takes(gate, up, grad):
            grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
            given = grad.contiguous(), gate, up, grad_gate, grad_up
            _triton().swiglu_backward(*(_rows(tensor) for tensor in given))
            return grad_gate, grad_up
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=1)
        straight = gate_up.is_contiguous()
        if straight and native.takes(gate_up, weight):
            num_rows, width = gate.shape
            out = native.empty((num_rows, width), gate_up)
            native.call("swiglu", gate_up, gate, up, 2 * width, weight.contiguous(), out, num_rows, width)
            return out
        if straight and triton.takes(gate_up, weight):
            return _triton().swiglu(gate, up, weight.contiguous())
        return F.silu(gate).mul_(up).mul_(weight.to(gate.dtype).unsqueeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return weighted_swiglu_backward(grad, *ctx.saved_tensors)


def weighted_swiglu_backward(grad_RF: Tensor, gate_up_RF: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`weighted_swiglu`, in one pass where there is a kernel: of ``gate_up`` and of the weights."""
    gate, up = gate_up_RF.chunk(2, dim=1)
    straight = gate_up_RF.is_contiguous()
    by_native = straight and native.takes(gate_up_RF, weight_R, grad_RF)
    grad_gate_up = native.empty(gate_up_RF.shape, gate_up_RF) if by_native else torch.empty_like(gate_up_RF)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
    if by_native:
        grad_weight = torch.empty_like(weight_R, memory_format=torch.contiguous_format)
        native.call(
            "swiglu_backward", gate_up_RF, grad_RF.contiguous(), gate, up, gate_up_RF.shape[1], weight_R.contiguous(),
            grad_gate, grad_up, grad_weight, *gate.shape,
        )  # fmt: skip
        return grad_gate_up, grad_weight
    if straight and triton.takes(gate_up_RF, weight_R, grad_RF):
        given = grad_RF.contiguous(), gate, up, grad_gate, grad_up, weight_R.contiguous()
        return grad_gate_up, _triton().swiglu_backward(*given)
    scale = weight_R.to(gate.dtype).unsqueeze(1)
    grad_silu_up = F.silu(gate).mul_(grad_RF)
    grad_weight = torch.linalg.vecdot(grad_silu_up, up).to(weight_R.dtype)
    torch.mul(grad_silu_up, scale, out=grad_up)
    torch.ops.aten.silu_backward.grad_input((grad_RF * up).mul_(scale), gate, grad_input=grad_gate)
    return grad_gate_up, grad_weight


def _rows(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1]) if tensor.numel() else tensor.view(0, tensor.shape[-1])


def _triton() -> ModuleType:
    from r1mega.kernels.triton import swiglu as kernels

    return kernels
