"""Matrix products that own their weight gradient: ``linear`` and ``grouped_linear``, and several at once.

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

from r1mega.kernels.parameter import WeightGradients, gradient_buffer, like_parameter, local


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
        weight_EOI: ``[E, O, I]``, a parameter.
        counts: rows of each expert; they add up to R.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        ``[R, O]``.
    """
    return _GroupedLinears.apply(input_RI, counts, store, weight_EOI)[0]


def grouped_linears(
    input_RI: Tensor, weights: Sequence[Tensor], counts: Sequence[int], store: WeightGradients | None = None
) -> tuple[Tensor, ...]:
    """:func:`grouped_linear` of one input with several weights; the input's gradient is summed inside the products."""
    return _GroupedLinears.apply(input_RI, counts, store, *weights)


class _GroupedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_RI, counts, store, *weights):
        ctx.save_for_backward(input_RI)
        ctx.weights, ctx.counts, ctx.store = weights, counts, store
        return tuple(_grouped_matmul(input_RI, local(weight).transpose(1, 2), counts) for weight in weights)

    @staticmethod
    def backward(ctx, *grads):
        (input_RI,) = ctx.saved_tensors
        weights, counts, store = ctx.weights, ctx.counts, ctx.store
        grads = [grad_RO.contiguous() for grad_RO in grads]
        grad_input = None
        if ctx.needs_input_grad[0]:
            for grad_RO, weight in zip(grads, weights, strict=True):
                grad_input = _grouped_matmul(grad_RO, local(weight), counts, add_to=grad_input)
        if not ctx.needs_input_grad[3]:
            return grad_input, None, None, *(None for _ in weights)
        if store is not None:
            for grad_RO, weight in zip(grads, weights, strict=True):
                store.add(partial(_add_grouped_product_to, weight, grad_RO, input_RI, counts))
            return grad_input, None, None, *(None for _ in weights)
        found = []
        for grad_RO, weight in zip(grads, weights, strict=True):
            gradient = torch.zeros_like(local(weight))
            _add_grouped_product(gradient, grad_RO, input_RI, counts)
            found.append(like_parameter(gradient, weight))
        return grad_input, None, None, *found


def _grouped_matmul(
    rows_RX: Tensor, weights_EXY: Tensor, counts: Sequence[int], add_to: Tensor | None = None
) -> Tensor:
    """``rows @ weights[e]`` for each group of rows (plus ``add_to``). One launch on a GPU, one an expert on a CPU."""
    if rows_RX.is_cuda:
        result = torch.nn.functional.grouped_mm(rows_RX, weights_EXY, offs=_offsets(counts, rows_RX.device))
        return result if add_to is None else add_to.add_(result)
    result = rows_RX.new_empty(rows_RX.shape[0], weights_EXY.shape[2]) if add_to is None else add_to
    start = 0
    for weight_XY, count in zip(weights_EXY.unbind(), counts, strict=True):
        if count:
            rows, out = rows_RX[start : start + count], result[start : start + count]
            if add_to is None:
                torch.mm(rows, weight_XY, out=out)
            else:
                out.addmm_(rows, weight_XY)
            start += count
    return result


def _add_grouped_product_to(weight: Tensor, grad_RO: Tensor, input_RI: Tensor, counts: Sequence[int]) -> None:
    _add_grouped_product(gradient_buffer(weight), grad_RO, input_RI, counts)


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
