"""Matrix products that own their weight gradient: ``linear`` and ``grouped_linear``.

Backward computes the input gradient at once. The weight gradient goes one of two ways:

* ``store`` is None: it is returned to autograd, as from ``torch.nn.functional.linear``;
* otherwise it is handed to ``store.add(work)`` as a piece of work that adds it to ``weight.grad``, now or later
  (a zero-bubble schedule runs it as its W). It is added inside the matrix product, so that no second gradient-sized
  tensor is written and read.

A weight may be a ``DTensor``: the products use its local shard, and its gradient has the same placement.
Shapes: T rows, R routed rows, I input features, O output features, E local experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class WeightGradients(Protocol):
    """What a layer needs of a weight-gradient store (``r1mega.pipeline.weight_gradient``)."""

    def add(self, work: Callable[[], None]) -> None: ...


def local(tensor: Tensor) -> Tensor:
    """The shard of a ``DTensor`` that this rank holds; any other tensor as it is. Not differentiable."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` of the local shard, as a ``DTensor`` where ``parameter`` is one."""
    if not isinstance(parameter, DTensor):
        return gradient
    return DTensor.from_local(
        gradient, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def gradient_buffer(parameter: Tensor) -> Tensor:
    """The local shard of ``parameter.grad``, made of zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = like_parameter(torch.zeros_like(local(parameter)), parameter)
    return local(parameter.grad)


def linear(input_TI: Tensor, weight_OI: Tensor, store: WeightGradients | None = None) -> Tensor:
    """``input @ weight.T``.

    Args:
        input_TI: ``[T, I]``.
        weight_OI: ``[O, I]``, a parameter.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        ``[T, O]``.
    """
    return _Linear.apply(input_TI, weight_OI, store)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TI, weight_OI, store):
        # The weight is not saved through autograd: FSDP frees and refills its storage between forward and backward.
        ctx.save_for_backward(input_TI)
        ctx.weight, ctx.store = weight_OI, store
        return input_TI @ local(weight_OI).t()

    @staticmethod
    def backward(ctx, grad_TO):
        (input_TI,) = ctx.saved_tensors
        weight, store = ctx.weight, ctx.store
        grad_input = grad_TO @ local(weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_input, None, None
        if store is None:
            return grad_input, like_parameter(grad_TO.t() @ input_TI, weight), None
        store.add(lambda: _add_product(weight, grad_TO, input_TI))
        return grad_input, None, None


def _add_product(weight: Tensor, grad_TO: Tensor, input_TI: Tensor) -> None:
    with torch.no_grad():
        if weight.grad is None:
            weight.grad = like_parameter(grad_TO.t() @ input_TI, weight)
        else:
            local(weight.grad).addmm_(grad_TO.t(), input_TI)


def grouped_linear(
    input_RI: Tensor, weight_EOI: Tensor, counts: Sequence[int], store: WeightGradients | None = None
) -> Tensor:
    """``input @ weight[e].T`` where rows of expert ``e`` stand together, experts in order.

    Args:
        input_RI: ``[R, I]``, sorted by expert.
        weight_EOI: ``[E, O, I]``, a parameter.
        counts: rows of each expert; they add up to R.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        ``[R, O]``.
    """
    return _GroupedLinear.apply(input_RI, weight_EOI, counts, store)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_RI, weight_EOI, counts, store):
        ctx.save_for_backward(input_RI)
        ctx.weight, ctx.counts, ctx.store = weight_EOI, counts, store
        return _grouped_matmul(input_RI, local(weight_EOI).transpose(1, 2), counts)

    @staticmethod
    def backward(ctx, grad_RO):
        (input_RI,) = ctx.saved_tensors
        weight, counts, store = ctx.weight, ctx.counts, ctx.store
        grad_RO = grad_RO.contiguous()
        grad_input = _grouped_matmul(grad_RO, local(weight), counts) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_input, None, None, None
        if store is None:
            gradient = torch.zeros_like(local(weight))
            _add_grouped_product(gradient, grad_RO, input_RI, counts)
            return grad_input, like_parameter(gradient, weight), None, None
        store.add(lambda: _add_grouped_product(gradient_buffer(weight), grad_RO, input_RI, counts))
        return grad_input, None, None, None


def _grouped_matmul(rows_RX: Tensor, weights_EXY: Tensor, counts: Sequence[int]) -> Tensor:
    """``rows @ weights[e]`` for each group of rows. On a GPU one launch; on a CPU a product an expert."""
    if rows_RX.is_cuda:
        return torch.nn.functional.grouped_mm(rows_RX, weights_EXY, offs=_offsets(counts, rows_RX.device))
    result = rows_RX.new_empty(rows_RX.shape[0], weights_EXY.shape[2])
    start = 0
    for weight_XY, count in zip(weights_EXY.unbind(), counts, strict=True):
        if count:
            torch.mm(rows_RX[start : start + count], weight_XY, out=result[start : start + count])
            start += count
    return result


@torch.no_grad()
def _add_grouped_product(gradient_EOI: Tensor, grad_RO: Tensor, input_RI: Tensor, counts: Sequence[int]) -> None:
    if grad_RO.is_cuda:
        offsets = _offsets(counts, grad_RO.device)
        gradient_EOI.add_(torch.nn.functional.grouped_mm(grad_RO.t(), input_RI, offs=offsets))
        return
    start = 0
    for gradient_OI, count in zip(gradient_EOI.unbind(), counts, strict=True):
        if count:
            gradient_OI.addmm_(grad_RO[start : start + count].t(), input_RI[start : start + count])
            start += count


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
