"""Matrix products that own their weight gradient: ``linear``, several of one input, and ``grouped_linear``.

Backward computes the input gradient at once. The weight gradient goes one of two ways:

* ``store`` is None: it is returned to autograd, as from ``torch.nn.functional.linear``;
* otherwise it is handed to ``store.add(work)`` as a piece of work that adds it to ``weight.grad``, now or later
  (a zero-bubble schedule runs it as its W). It is added inside the matrix product, so that no second gradient-sized
  tensor is written and read.

A weight may be a ``DTensor``: the products use its local shard, and its gradient has the same placement.

On a CPU :mod:`r1mega.kernels.products` multiplies; a grouped product is one product an expert, of rows that the host
has counted. On a GPU the counts may be a tensor there, and nothing waits for the host: one launch multiplies all rows,
PyTorch's ``grouped_mm`` where it has a kernel for the type and the GPU, else Triton's. Where there is neither,
``grouped_mm`` reads the counts and multiplies expert by expert.

Shapes: T rows, R routed rows, I input features, O output features, E local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.kernels import check, triton
from r1mega.kernels.fake import has_no_numbers, is_fake, on_host
from r1mega.kernels.parameter import WeightGradients, like_parameter, local
from r1mega.kernels.products import add_matmul, group_matmul, group_outer, matmul

Counts = Sequence[int] | Tensor


def linear(input_TI: Tensor, weight_OI: Tensor, store: WeightGradients | None = None) -> Tensor:
    """``input @ weight.T``.

    Args:
        input_TI: ``[T, I]``.
        weight_OI: ``[O, I]``, a parameter.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        ``[T, O]``.

    Raises:
        ValueError: for shapes or devices that do not fit.
    """
    _check(input_TI, (weight_OI,))
    return _Linears.apply(input_TI, store, weight_OI)[0]


def linears(input_TI: Tensor, weights: Sequence[Tensor], store: WeightGradients | None = None) -> tuple[Tensor, ...]:
    """:func:`linear` of one input with several weights; the input's gradient is summed inside the products."""
    _check(input_TI, weights)
    return _Linears.apply(input_TI, store, *weights)


def _check(input_TI: Tensor, weights: Sequence[Tensor]) -> None:
    check.matrix("input_TI", input_TI)
    for weight_OI in map(local, weights):
        check.matrix("weight_OI", weight_OI)
        check.shaped("weight_OI", weight_OI, (weight_OI.shape[0], input_TI.shape[1]), input_TI.device)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TI, store, *weights):
        # The weights are not saved through autograd: FSDP frees and refills their storage between forward and backward.
        ctx.save_for_backward(input_TI)
        ctx.weights, ctx.store = weights, store
        return tuple(matmul(input_TI, local(weight).t()) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (input_TI,) = ctx.saved_tensors
        weights, store = ctx.weights, ctx.store
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad_input = matmul(grads[0], local(weights[0]))
            for grad_TO, weight in zip(grads[1:], weights[1:], strict=True):
                add_matmul(grad_input, grad_TO, local(weight))
        if not ctx.needs_input_grad[2]:
            return grad_input, None, *(None for _ in weights)
        if store is None:
            pairs = zip(grads, weights, strict=True)
            return grad_input, None, *(like_parameter(matmul(grad.t(), input_TI), weight) for grad, weight in pairs)
        input_TI = input_TI.detach()  # with its graph, work that waits would hold the input of the stage, too
        for grad_TO, weight in zip(grads, weights, strict=True):
            store.add(partial(_add_product, weight, grad_TO, input_TI))
        return grad_input, None, *(None for _ in weights)


@torch.no_grad()
def _add_product(weight: Tensor, grad_TO: Tensor, input_TI: Tensor) -> None:
    if weight.grad is None:
        weight.grad = like_parameter(matmul(grad_TO.t(), input_TI), weight)
    else:
        add_matmul(local(weight.grad), grad_TO.t(), input_TI)


def grouped_linear(
    input_RI: Tensor, weight_EOI: Tensor, counts: Counts, store: WeightGradients | None = None
) -> Tensor:
    """``input @ weight[e].T`` where rows of expert ``e`` stand together, experts in order.

    Args:
        input_RI: ``[R, I]``, sorted by expert.
        weight_EOI: ``[E, O, I]``, a parameter; or ``[E, n, O / n, I]``, whose n products stand side by side.
        counts: rows of each expert, numbers or an integer tensor ``[E]``. They add up to R; where a tensor adds up to
            less, the rows after them are undefined in the result and in the input's gradient. For rows on a GPU a
            tensor there is better: numbers have to be copied to it, and the host waits for that.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        ``[R, O]``.

    Raises:
        ValueError: for shapes or devices that do not fit, and for counts on the host that do not fit the rows.
    """
    check_grouped(input_RI, weight_EOI, counts, "input_RI", "weight_EOI")
    return _GroupedLinear.apply(input_RI, weight_EOI, Rows.of(input_RI, counts), store)


def check_grouped(input_RI: Tensor, weight_EOI: Tensor, counts: Counts, *names: str) -> None:
    """Raises ValueError unless :func:`grouped_linear` can multiply these. ``names``: the caller's of the first two.

    The counts are looked at where the host has them: the kernels would read and write outside of the rows.
    """
    input_name, weight_name = names
    weight_EOI = local(weight_EOI)
    check.matrix(input_name, input_RI)
    if weight_EOI.dim() < 3:
        raise ValueError(f"{weight_name}: must have 3 dimensions or more, not {weight_EOI.dim()}")
    check.shaped(weight_name, weight_EOI, (*weight_EOI.shape[:-1], input_RI.shape[1]), input_RI.device)
    num_rows, num_experts = input_RI.shape[0], weight_EOI.shape[0]
    if isinstance(counts, Tensor):
        check.integers("counts", counts, (num_experts,))
        if not on_host(counts):
            return
    elif len(counts) != num_experts:
        raise ValueError(f"counts: must be {num_experts} numbers, one of each expert, not {len(counts)}")
    numbers = counts.tolist() if isinstance(counts, Tensor) else counts
    if min(numbers, default=0) < 0:
        raise ValueError(f"counts: must be 0 at least, not {min(numbers)}")
    total = sum(numbers)
    if total > num_rows or (total < num_rows and not isinstance(counts, Tensor)):
        raise ValueError(f"counts: must add up to the {num_rows} rows of {input_name}, not to {total}")


@dataclass
class Rows:
    """Where each expert's rows are.

    Args:
        counts: rows of each expert, on the host; None where the device knows them.
        ends: ``[E]`` int32, the row after the last one of each expert, on the device; None where the host knows them.
    """

    counts: Sequence[int] | None
    ends: Tensor | None = None

    @classmethod
    def of(cls, input_RI: Tensor, counts: Counts) -> Rows:
        """The rows of an operation on ``input_RI``."""
        if on_host(input_RI) and not triton.takes(input_RI):
            return cls(counts.tolist() if isinstance(counts, Tensor) else counts)
        if has_no_numbers(input_RI) and not isinstance(counts, Tensor):
            return cls(counts)
        counts_E = torch.as_tensor(counts, device=input_RI.device)
        return cls(None, counts_E.cumsum(0, dtype=torch.int32))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_RI, weight, rows, store):
        ctx.save_for_backward(input_RI)
        ctx.weight, ctx.rows, ctx.store = weight, rows, store
        return _multiply(input_RI, local(weight).flatten(1, -2).transpose(1, 2), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RO):
        (input_RI,) = ctx.saved_tensors
        return *gradients(ctx, grad_RO.contiguous(), input_RI), None, None


def gradients(ctx, grad_RO: Tensor, input_RI: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of the input and of the weight, as far as they are wanted here and now.

    Args:
        ctx: of a function whose first two inputs they are, with ``weight``, ``rows`` and ``store``.
        grad_RO: ``[R, O]``, contiguous, of the product.
        input_RI: ``[R, I]``.
    """
    weight, rows, store = ctx.weight, ctx.rows, ctx.store
    grad_input, grad_weight = None, None
    if ctx.needs_input_grad[0]:
        grad_input = _multiply(grad_RO, local(weight).flatten(1, -2), rows)
    if ctx.needs_input_grad[1] and store is not None:
        store.add(partial(_add_weight_gradient, weight, grad_RO, input_RI.detach(), rows))
    elif ctx.needs_input_grad[1]:
        grad_weight = like_parameter(_weight_gradient(weight, grad_RO, input_RI, rows), weight)
    return grad_input, grad_weight


def _multiply(rows_RX: Tensor, weights_EXY: Tensor, rows: Rows) -> Tensor:
    """``rows @ weights[e]`` for each group of rows."""
    if is_fake(rows_RX) or rows_RX.shape[0] == 0:
        return rows_RX.new_empty(rows_RX.shape[0], weights_EXY.shape[2])
    if rows.ends is not None:
        if _by_triton(rows_RX, weights_EXY):
            return _triton().matmul(rows_RX.contiguous(), weights_EXY, rows.ends)
        return F.grouped_mm(rows_RX, weights_EXY, offs=rows.ends)
    assert rows.counts is not None
    return group_matmul(rows_RX, weights_EXY, rows.counts)


@torch.no_grad()
def _add_weight_gradient(weight: Tensor, grad_RO: Tensor, input_RI: Tensor, rows: Rows) -> None:
    if weight.grad is None:
        weight.grad = like_parameter(_weight_gradient(weight, grad_RO, input_RI, rows), weight)
        return
    if grad_RO.shape[0] == 0:
        return
    gradient_EOI = local(weight.grad).flatten(1, -2)
    if rows.ends is not None:
        if _by_triton(grad_RO, input_RI) and gradient_EOI.is_contiguous():
            _triton().outer(grad_RO, input_RI.contiguous(), rows.ends, add_to=gradient_EOI)
        else:
            gradient_EOI.add_(_products(grad_RO, input_RI, rows.ends))
        return
    assert rows.counts is not None
    group_outer(grad_RO, input_RI, rows.counts, gradient_EOI, add=True)


def _weight_gradient(weight: Tensor, grad_RO: Tensor, input_RI: Tensor, rows: Rows) -> Tensor:
    """The weight gradient of one microbatch, in the shape of ``weight``'s local shard."""
    if is_fake(grad_RO) or grad_RO.shape[0] == 0:
        return torch.zeros_like(local(weight))
    if rows.ends is not None:
        return _products(grad_RO, input_RI, rows.ends).view(local(weight).shape)
    assert rows.counts is not None
    gradient = torch.empty_like(local(weight))
    group_outer(grad_RO, input_RI, rows.counts, gradient.flatten(1, -2), add=False)
    return gradient


def _products(grad_RO: Tensor, input_RI: Tensor, ends_E: Tensor) -> Tensor:
    if _by_triton(grad_RO, input_RI):
        return _triton().outer(grad_RO, input_RI.contiguous(), ends_E)
    return F.grouped_mm(grad_RO.t(), input_RI, offs=ends_E)


def _by_triton(left: Tensor, right: Tensor) -> bool:
    return triton.takes(left, right) and not _triton().library_multiplies(left, right.shape[-1])


def _triton() -> ModuleType:
    from r1mega.kernels.triton import grouped

    return grouped
