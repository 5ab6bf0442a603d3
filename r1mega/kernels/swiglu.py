"""``silu(gate) * up``; and from one tensor, times one weight a row (the router's weight of a routed row)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1mega.kernels import native


def swiglu(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """``silu(gate) * up``, all ``[R, F]``."""
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
    """
    return _WeightedSwiGLU.apply(gate_up_RF, weight_R)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up only; silu(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        if not (native.takes(gate, up) and gate.is_contiguous() and up.is_contiguous()):
            return F.silu(gate).mul_(up)
        out = native.empty(gate.shape, gate)
        width = gate.shape[-1]
        native.call("swiglu", gate, gate, up, width, None, out, gate.numel() // max(width, 1), width)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if not (native.takes(gate, up, grad) and gate.is_contiguous() and up.is_contiguous()):
            return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
        grad_gate, grad_up = native.empty(gate.shape, gate), native.empty(up.shape, up)
        width = gate.shape[-1]
        native.call(
            "swiglu_backward", gate, grad.contiguous(), gate, up, width, None, grad_gate, grad_up, None,
            gate.numel() // max(width, 1), width,
        )  # fmt: skip
        return grad_gate, grad_up


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=1)
        if not (native.takes(gate_up, weight) and gate_up.is_contiguous()):
            return F.silu(gate).mul_(up).mul_(weight.to(gate.dtype).unsqueeze(1))
        num_rows, width = gate.shape
        out = native.empty((num_rows, width), gate_up)
        native.call("swiglu", gate_up, gate, up, 2 * width, weight.contiguous(), out, num_rows, width)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=1)
        if native.takes(gate_up, weight, grad) and gate_up.is_contiguous():
            grad_gate_up = native.empty(gate_up.shape, gate_up)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            native.call(
                "swiglu_backward", gate_up, grad.contiguous(), gate, up, gate_up.shape[1], weight.contiguous(),
                grad_gate, grad_up, grad_weight, *gate.shape,
            )  # fmt: skip
            return grad_gate_up, grad_weight
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
        scale = weight.to(gate.dtype).unsqueeze(1)
        grad_silu_up = F.silu(gate).mul_(grad)
        grad_weight = torch.linalg.vecdot(grad_silu_up, up).to(weight.dtype)
        torch.mul(grad_silu_up, scale, out=grad_up)
        torch.ops.aten.silu_backward.grad_input((grad * up).mul_(scale), gate, grad_input=grad_gate)
        return grad_gate_up, grad_weight
