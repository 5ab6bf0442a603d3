"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.kernels import check, native, triton
from r1mega.kernels.parameter import WeightGradients, gradient_buffer, like_parameter, local


def rms_norm(input_TH: Tensor, weight_H: Tensor, eps: float, store: WeightGradients | None = None) -> Tensor:
    """``input / sqrt(mean(input**2) + eps) * weight`` over the last dimension, computed in float32 or wider.

    Args:
        input_TH: ``[..., H]``.
        weight_H: ``[H]``, a parameter.
        eps: added to the mean square.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        The shape and dtype of ``input_TH``.

    Raises:
        ValueError: for a weight of another shape or device.
    """
    check.shaped("weight_H", local(weight_H), input_TH.shape[-1:], input_TH.device)
    return _RMSNorm.apply(input_TH, weight_H, eps, store)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one scale a row."""

    @staticmethod
    def forward(ctx, input_TH, weight_H, eps, store):
        out, scale = _forward(input_TH, local(weight_H), eps)
        ctx.save_for_backward(input_TH, scale)
        ctx.weight, ctx.store = weight_H, store
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TH):
        input_TH, scale = ctx.saved_tensors
        parameter, store = ctx.weight, ctx.store
        grad_input, rows = _backward(grad_TH, input_TH, local(parameter), scale)
        grad_weight = rows.sum(0)  # now, so that work that waits holds one row only
        if store is None:
            return grad_input, like_parameter(grad_weight.to(parameter.dtype), parameter), None, None
        store.add(lambda: gradient_buffer(parameter).add_(grad_weight))
        return grad_input, None, None, None


def _forward(input_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and ``1 / sqrt(mean(input**2) + eps)`` of each row, which has a last dimension of 1."""
    stride = native.row_stride(input_TH)
    if stride is None or not native.takes(input_TH, weight_H):
        if stride is not None and triton.takes(input_TH, weight_H):
            return _triton_forward(input_TH, weight_H, eps)
        return _reference_forward(input_TH, weight_H, eps)
    out = native.empty(input_TH.shape, input_TH)
    scale = input_TH.new_empty(*input_TH.shape[:-1], 1)
    arguments = (input_TH, stride, weight_H.contiguous(), eps, out, scale, scale.numel(), input_TH.shape[-1])
    native.call("rms_norm", input_TH, *arguments)
    return out, scale


def _backward(grad_TH: Tensor, input_TH: Tensor, weight_H: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The input's gradient, and rows ``[..., H]`` whose sum is the weight's."""
    stride = native.row_stride(input_TH)
    if stride is None or not native.takes(grad_TH, input_TH, weight_H):
        if stride is not None and triton.takes(grad_TH, input_TH, weight_H):
            return _triton_backward(grad_TH, input_TH, weight_H, scale)
        return _reference_backward(grad_TH, input_TH, weight_H, scale)
    assert native.library is not None
    num_rows, width = scale.numel(), input_TH.shape[-1]
    grad_input = native.empty(input_TH.shape, input_TH)
    partial = input_TH.new_empty(-(-num_rows // native.library.ROWS_OF_PARTIAL), width)
    native.call(
        "rms_norm_backward", input_TH, grad_TH.contiguous(), input_TH, stride, weight_H.contiguous(), scale,
        grad_input, partial, num_rows, width,
    )  # fmt: skip
    return grad_input, partial


def _triton_forward(input_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from r1mega.kernels.triton import rms_norm as kernels

    width = input_TH.shape[-1]
    if width > kernels.WIDEST or input_TH.numel() == 0:
        return _reference_forward(input_TH, weight_H, eps)
    out, scale = kernels.rms_norm(input_TH.view(-1, width), weight_H.contiguous(), eps)
    return out.view(input_TH.shape), scale.view(*input_TH.shape[:-1], 1)


def _triton_backward(grad_TH: Tensor, input_TH: Tensor, weight_H: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    from r1mega.kernels.triton import rms_norm as kernels

    width = input_TH.shape[-1]
    if width > kernels.WIDEST or input_TH.numel() == 0:
        return _reference_backward(grad_TH, input_TH, weight_H, scale)
    grad, x = grad_TH.contiguous().view(-1, width), input_TH.view(-1, width)
    grad_input, partial = kernels.rms_norm_backward(grad, x, weight_H.contiguous(), scale.view(-1))
    return grad_input.view(input_TH.shape), partial


def _reference_forward(input_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(input_TH.dtype, torch.float32)
    x = input_TH.to(wide)
    scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return (x * scale).to(input_TH.dtype).mul_(weight_H), scale


def _reference_backward(grad_TH: Tensor, input_TH: Tensor, weight_H: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    normed = input_TH.to(scale.dtype) * scale
    grad = grad_TH.to(scale.dtype)
    product = grad * normed
    mean = (product @ weight_H.to(scale.dtype)).div_(product.shape[-1]).unsqueeze(-1)
    grad_input = (grad * weight_H).addcmul_(normed, mean, value=-1).mul_(scale).to(input_TH.dtype)
    return grad_input, product.flatten(0, -2)
