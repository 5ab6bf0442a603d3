"""``silu(gate) * up``, and the same times one weight a row (the router's weight of a routed row)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_RF: Tensor, up_RF: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * weight[:, None]``.

    The router's weight is applied here and not to the expert's output, so that its gradient needs no copy of that
    output: ``dL/dweight = <dL/d(result), silu(gate) * up>`` (SonicMoE).

    Args:
        gate_RF: ``[R, F]``.
        up_RF: ``[R, F]``.
        weight_R: ``[R]``, float32 or wider; None multiplies by nothing.

    Returns:
        ``[R, F]`` in the dtype of ``gate_RF``.
    """
    if weight_R is None:
        return _SwiGLU.apply(gate_RF, up_RF)
    return _WeightedSwiGLU.apply(gate_RF, up_RF, weight_R)


class _SwiGLU(torch.autograd.Function):
    """Keeps gate and up only; silu(gate) is computed again in backward."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.silu(gate).mul_(up).mul_(weight.to(gate.dtype).unsqueeze(1))

    @staticmethod
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        silu = F.silu(gate)
        grad_weight = torch.linalg.vecdot(grad * silu, up).to(weight.dtype)
        grad = grad * weight.to(gate.dtype).unsqueeze(1)
        return torch.ops.aten.silu_backward(grad * up, gate), silu.mul_(grad), grad_weight
