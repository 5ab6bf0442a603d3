"""Rotary position embedding: each pair of the last dimension turns by its position's angle (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.kernels import check, native


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of the last dimension.

    Args:
        x: ``[batch, length, heads, dim]``.
        cos: ``[length, dim / 2]``.
        sin: ``[length, dim / 2]``.
        interleaved: pairs are neighbours ``(0, 1), (2, 3), ...`` (DeepSeek) rather than halves ``(0, dim/2), ...``.

    Returns:
        The shape of ``x``, always in halves: an order that scores do not see, as keys and queries share it.

    Raises:
        ValueError: for shapes or devices that do not fit.
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: must have shape [batch, length, heads, dim], dim even, not {list(x.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        check.shaped(name, table, (x.shape[1], x.shape[3] // 2), x.device)
    return _Rotate.apply(x, cos, sin, interleaved)


class _Rotate(torch.autograd.Function):
    """The backward turns the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(x, cos, sin, interleaved, False, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _turn(grad, *ctx.saved_tensors, False, ctx.interleaved, back=True), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved_input: bool, interleaved_out: bool, back: bool) -> Tensor:
    stride = _stride_of_heads(x)
    if stride is None or not native.takes(x, cos, sin) or not (cos.is_contiguous() and sin.is_contiguous()):
        return reference_turn(x, cos, sin, interleaved_input, interleaved_out, back)
    out = native.empty(x.shape, x)
    _, length, heads, dim = x.shape
    native.call(
        "rotate", x, x, stride, cos, sin, out, x.numel() // max(dim, 1), heads, length, dim // 2, interleaved_input,
        interleaved_out, back,
    )  # fmt: skip
    return out


def reference_turn(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved_input: bool, interleaved_out: bool, back: bool
) -> Tensor:
    """The rotation in PyTorch's operations, by the angles or ``back``."""
    cos, sin, sign = cos.unsqueeze(1), sin.unsqueeze(1), -1 if back else 1
    first, second = _pairs(x, interleaved_input)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = _pairs(out, interleaved_out)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return first, second


def _stride_of_heads(x: Tensor) -> int | None:
    """Elements from one head to the next, over all tokens and sequences; None where there is no such number."""
    if x.is_contiguous():
        return x.shape[-1]
    _, length, heads, _ = x.shape
    of_sequence, of_token, of_head, of_element = x.stride()
    stride = of_head if heads > 1 else of_token
    evenly = of_token == heads * stride and of_sequence == length * heads * stride
    return stride if of_element == 1 and evenly else None
