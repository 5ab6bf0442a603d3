"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(input_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``input / sqrt(mean(input**2) + eps) * weight`` over the last dimension, computed in float32 or wider.

    Args:
        input_TH: ``[..., H]``.
        weight_H: ``[H]``.
        eps: added to the mean square.

    Returns:
        The shape and dtype of ``input_TH``.
    """
    return _RMSNorm.apply(input_TH, weight_H, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and one scale a row."""

    @staticmethod
    def forward(ctx, input_TH, weight_H, eps):
        wide = torch.promote_types(input_TH.dtype, torch.float32)
        x = input_TH.to(wide)
        scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(input_TH, weight_H, scale)
        return (x * scale).to(input_TH.dtype).mul_(weight_H)

    @staticmethod
    def backward(ctx, grad_TH):
        input_TH, weight_H, scale = ctx.saved_tensors
        normed = input_TH.to(scale.dtype) * scale
        grad = grad_TH.to(scale.dtype)
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight_H.dtype)
        mean = (product @ weight_H.to(scale.dtype)).div_(product.shape[-1]).unsqueeze(-1)
        grad_input = (grad * weight_H).addcmul_(normed, mean, value=-1).mul_(scale)
        return grad_input.to(input_TH.dtype), grad_weight, None
