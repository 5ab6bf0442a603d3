"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """
    return _RMSNorm.apply(input_TH, weight_H, eps, store)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one scale a row."""

    @staticmethod
    def forward(ctx, input_TH, weight_H, eps, store):
        wide = torch.promote_types(input_TH.dtype, torch.float32)
        x = input_TH.to(wide)
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(input_TH, scale)
        ctx.weight, ctx.store = weight_H, store
        return (x * scale).to(input_TH.dtype).mul_(local(weight_H))

    @staticmethod
    def backward(ctx, grad_TH):
        input_TH, scale = ctx.saved_tensors
        parameter, store = ctx.weight, ctx.store
        weight_H = local(parameter)
        normed = input_TH.to(scale.dtype) * scale
        grad = grad_TH.to(scale.dtype)
        product = grad * normed
        mean = (product @ weight_H.to(scale.dtype)).div_(product.shape[-1]).unsqueeze(-1)
        grad_input = (grad * weight_H).addcmul_(normed, mean, value=-1).mul_(scale).to(input_TH.dtype)
        grad_weight = product.flatten(0, -2).sum(0)  # now, so that work that waits holds one row only
        if store is None:
            return grad_input, like_parameter(grad_weight.to(weight_H.dtype), parameter), None, None
        store.add(lambda: gradient_buffer(parameter).add_(grad_weight))
        return grad_input, None, None, None
