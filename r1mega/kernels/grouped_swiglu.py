"""``grouped_swiglu``: gate and up projection of each expert's rows, SwiGLU, router's weight; one kernel on a GPU.

Shapes: R routed rows, H hidden, E local experts, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.kernels import check, triton
from r1mega.kernels.linear import Counts, Rows, check_grouped, gradients, grouped_linear
from r1mega.kernels.parameter import WeightGradients, local
from r1mega.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward


def grouped_swiglu(
    input_RH: Tensor,
    gate_up_E2FH: Tensor,
    weight_R: Tensor,
    counts: Counts,
    store: WeightGradients | None = None,
) -> Tensor:
    """``silu(input @ gate[e].T) * (input @ up[e].T) * weight[:, None]``: a :func:`grouped_linear` and its SwiGLU.

    With Triton both are one kernel; it keeps the two products for the backward, as the two operations do.

    Args:
        input_RH: ``[R, H]``, sorted by expert.
        gate_up_E2FH: ``[E, 2, F, H]``, a parameter: gate and up of each expert.
        weight_R: ``[R]``, the router's weight of each row.
        counts: as for :func:`grouped_linear`.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        ``[R, F]``.

    Raises:
        ValueError: for shapes or devices that do not fit, and for counts on the host that do not fit the rows.
    """
    check_grouped(input_RH, gate_up_E2FH, counts, "input_RH", "gate_up_E2FH")
    parts = tuple(local(gate_up_E2FH).shape)
    if len(parts) != 4 or parts[1] != 2:
        raise ValueError(f"gate_up_E2FH: must have shape [E, 2, F, H], gate and up of each expert, not {list(parts)}")
    check.shaped("weight_R", weight_R, input_RH.shape[:1], input_RH.device)
    if triton.takes(input_RH, local(gate_up_E2FH), weight_R):
        return _GroupedSwiGLU.apply(input_RH, gate_up_E2FH, weight_R, Rows.of(input_RH, counts), store)
    return weighted_swiglu(grouped_linear(input_RH, gate_up_E2FH, counts, store), weight_R)


class _GroupedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_RH, weight, weight_R, rows, store):
        from r1mega.kernels.triton.grouped import gate_up_swiglu

        given = input_RH.contiguous(), local(weight).contiguous(), weight_R.contiguous()
        out, gate_up = gate_up_swiglu(*given, rows.ends)
        ctx.save_for_backward(input_RH, gate_up, weight_R)
        ctx.weight, ctx.rows, ctx.store = weight, rows, store
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RF):
        input_RH, gate_up, weight_R = ctx.saved_tensors
        grad_gate_up, grad_weight_R = weighted_swiglu_backward(grad_RF, gate_up, weight_R)
        return *gradients(ctx, grad_gate_up, input_RH), grad_weight_R, None, None
