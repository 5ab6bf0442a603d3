"""Matrix products that own their weight gradient: ``linear``, several of one input, and ``grouped_linear``.

Backward computes the input gradient at once. The weight gradient goes one of two ways:

* ``store`` is None: it is returned to autograd, as from ``torch.nn.functional.linear``;
* otherwise it is handed to ``store.add(work)`` as a piece of work that adds it to ``weight.grad``, now or later
  (a zero-bubble schedule runs it as its W). It is added inside the matrix product, so that no second gradient-sized
  tensor is written and read.

A weight may be a ``DTensor``: the products use its local shard, and its gradient has the same placement.
Shapes: T rows, R routed rows, I input features, O output features, E local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from r1mega.kernels.parameter import WeightGradients, like_parameter, local


def linear(input_TI: Tensor, weight_OI: Tensor, store: WeightGradients | None = None) -> Tensor:
    """``input @ weight.T``.

    Args:
        input_TI: ``[T, I]``.
        weight_OI: ``[O, I]``, a parameter.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        ``[T, O]``.
    """
    return _Linears.apply(input_TI, store, weight_OI)[0]


def linears(input_TI: Tensor, weights: Sequence[Tensor], store: WeightGradients | None = None) -> tuple[Tensor, ...]:
    """:func:`linear` of one input with several weights; the input's gradient is summed inside the products."""
    return _Linears.apply(input_TI, store, *weights)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TI, store, *weights):
        # The weights are not saved through autograd: FSDP frees and refills their storage between forward and backward.
        ctx.save_for_backward(input_TI)
        ctx.weights, ctx.store = weights, store
        return tuple(input_TI @ local(weight).t() for weight in weights)

    @staticmethod
    def backward(ctx, *grads):
        (input_TI,) = ctx.saved_tensors
        weights, store = ctx.weights, ctx.store
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = grads[0] @ local(weights[0])
            for grad_TO, weight in zip(grads[1:], weights[1:], strict=True):
                grad_input.addmm_(grad_TO, local(weight))
        if not ctx.needs_input_grad[2]:
            return grad_input, None, *(None for _ in weights)
        if store is None:
            pairs = zip(grads, weights, strict=True)
            return grad_input, None, *(like_parameter(grad_TO.t() @ input_TI, weight) for grad_TO, weight in pairs)
        input_TI = input_TI.detach()  # with its graph, work that waits would hold the input of the stage, too
        for grad_TO, weight in zip(grads, weights, strict=True):
            store.add(partial(_add_product, weight, grad_TO, input_TI))
        return grad_input, None, *(None for _ in weights)


@torch.no_grad()
def _add_product(weight: Tensor, grad_TO: Tensor, input_TI: Tensor) -> None:
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
        weight_EOI: ``[E, O, I]``, a parameter; or ``[E, n, O / n, I]``, whose n products stand side by side.
        counts: rows of each expert; they add up to R.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        ``[R, O]``.
    """
    return _GroupedLinear.apply(input_RI, weight_EOI, counts, store)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_RI, weight, counts, store):
        ctx.save_for_backward(input_RI)
        ctx.weight, ctx.counts, ctx.store = weight, counts, store
        return _grouped_matmul(input_RI, local(weight).flatten(1, -2).transpose(1, 2), counts)

    @staticmethod
    def backward(ctx, grad_RO):
        (input_RI,) = ctx.saved_tensors
        weight, counts, store = ctx.weight, ctx.counts, ctx.store
        grad_RO, grad_input, grad_weight = grad_RO.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_input = _grouped_matmul(grad_RO, local(weight).flatten(1, -2), counts)
        if ctx.needs_input_grad[1] and store is not None:
            store.add(partial(_add_grouped_product, weight, grad_RO, input_RI.detach(), counts))
        elif ctx.needs_input_grad[1]:
            grad_weight = like_parameter(_grouped_product(weight, grad_RO, input_RI, counts), weight)
        return grad_input, grad_weight, None, None


def _grouped_matmul(rows_RX: Tensor, weights_EXY: Tensor, counts: Sequence[int]) -> Tensor:
    """``rows @ weights[e]`` for each group of rows. One launch on a GPU, one an expert on a CPU."""
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
def _add_grouped_product(weight: Tensor, grad_RO: Tensor, input_RI: Tensor, counts: Sequence[int]) -> None:
    if weight.grad is None:
        weight.grad = like_parameter(_grouped_product(weight, grad_RO, input_RI, counts), weight)
        return
    gradient_EOI = local(weight.grad).flatten(1, -2)
    if grad_RO.is_cuda:
        gradient_EOI.add_(torch.nn.functional.grouped_mm(grad_RO.t(), input_RI, offs=_offsets(counts, grad_RO.device)))
        return
    start = 0
    for gradient_OI, count in zip(gradient_EOI.unbind(), counts, strict=True):
        if count:
            gradient_OI.addmm_(grad_RO[start : start + count].t(), input_RI[start : start + count])
            start += count


def _grouped_product(weight: Tensor, grad_RO: Tensor, input_RI: Tensor, counts: Sequence[int]) -> Tensor:
    """The weight gradient of one microbatch, in the shape of ``weight``'s local shard."""
    shape = local(weight).shape
    if grad_RO.is_cuda:
        offsets = _offsets(counts, grad_RO.device)
        return torch.nn.functional.grouped_mm(grad_RO.t(), input_RI, offs=offsets).view(shape)
    gradient = torch.empty_like(local(weight))
    start = 0
    for gradient_OI, count in zip(gradient.flatten(1, -2).unbind(), counts, strict=True):
        if count:
            torch.mm(grad_RO[start : start + count].t(), input_RI[start : start + count], out=gradient_OI)
            start += count
        else:
            gradient_OI.zero_()
    return gradient


def _offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
