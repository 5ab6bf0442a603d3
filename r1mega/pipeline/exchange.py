"""Stages that can be cut where they communicate, so that one microbatch computes while another's messages fly.

A stage that wants this is called ``stage(activations, microbatch, stepwise=True)`` and returns a generator: it yields a
:class:`Cut` at each communication and is sent what came back. Run alone, a cut is an ordinary node of autograd
(:func:`at_once`). Run beside a backward, the graph ends at each cut, so that the backward, too, can pause there
(:func:`in_parts`, :func:`backward_of_parts`); DualPipe overlaps a forward and a backward so (arXiv 2412.19437,
section 3.2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

Result = TypeVar("Result")
Tensors = tuple[Tensor, ...]


class Pending(Protocol):
    """A communication under way."""

    def wait(self) -> Tensors:
        """What came back."""


class Exchange(Protocol):
    """A communication and its backward, ``start(*inputs)`` and ``start_backward(*gradients)``; no autograd in them."""

    @property
    def start(self) -> Callable[..., Pending]: ...

    @property
    def start_backward(self) -> Callable[..., Pending]: ...


@dataclass(slots=True)
class Cut:
    """Where a stage communicates. The answer to it is ``(what came back, kept)``.

    Args:
        inputs: what is sent.
        exchange: the communication; None hands the inputs on.
        kept: all other tensors of before that are needed after.
        losses: losses that arose since the cut before.
    """

    inputs: Tensors
    exchange: Exchange | None
    kept: Tensors = ()
    losses: Tensors = ()


Answer = tuple[Tensors, Tensors]
Steps = Generator[Cut, Answer, Result]


def keeping(steps: Steps[Result], *tensors: Tensor) -> Generator[Cut, Answer, tuple[Result, Tensors]]:
    """Delegate to ``steps`` and carry ``tensors`` over its cuts; returns its result and the tensors."""
    answer: Any = None
    while True:
        try:
            cut = steps.send(answer)
        except StopIteration as end:
            return end.value, tensors
        num_kept = len(cut.kept)
        cut.kept = (*cut.kept, *tensors)
        received, kept = yield cut
        answer, tensors = (received, kept[:num_kept]), kept[num_kept:]


def at_once(steps: Steps[Result]) -> tuple[Result, Tensors]:
    """Run ``steps`` as one graph; its result and the losses of its cuts."""
    losses: Tensors = ()
    answer: Any = None
    while True:
        try:
            cut = steps.send(answer)
        except StopIteration as end:
            return end.value, losses
        losses += cut.losses
        received = cut.inputs if cut.exchange is None else exchange_at_once(cut.exchange, *cut.inputs)
        answer = received, cut.kept


def exchange_at_once(exchange: Exchange, *inputs: Tensor) -> Tensors:
    """Communicate and wait; differentiable."""
    received: Tensors = _AtOnce.apply(exchange, *inputs)
    return received


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, *inputs):
        ctx.exchange = exchange
        return exchange.start(*inputs).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        return None, *ctx.exchange.start_backward(*gradients).wait()


@dataclass(slots=True)
class Part:
    """What the backward needs of the graph up to one cut: its ends, and the leaves with which the next part began."""

    exchange: Exchange
    inputs: list[GradientEdge | None]
    received: Tensors
    kept: list[tuple[GradientEdge, Tensor]]
    losses: Tensors


def in_parts(steps: Steps[Result]) -> Generator[None, None, tuple[Result, list[Part], Tensors]]:
    """Run ``steps``, pausing while a communication is under way.

    Returns:
        Its result, the parts of the graph in order, and the losses after the last cut.
    """
    parts: list[Part] = []
    losses: Tensors = ()
    answer: Any = None
    while True:
        try:
            cut = steps.send(answer)
        except StopIteration as end:
            return end.value, parts, losses
        losses += tuple(loss for loss in cut.losses if loss.requires_grad)
        if cut.exchange is None:
            answer = cut.inputs, cut.kept
            continue
        edges = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in cut.inputs]
        wants_gradient = any(tensor.requires_grad for tensor in cut.inputs)
        pending = cut.exchange.start(*(tensor.detach() for tensor in cut.inputs))
        yield
        received = tuple(tensor.requires_grad_(wants_gradient) for tensor in pending.wait())
        kept = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in cut.kept)
        pairs = zip(cut.kept, kept, strict=True)
        kept_edges = [(get_gradient_edge(before), after) for before, after in pairs if before.requires_grad]
        parts.append(Part(cut.exchange, edges, received, kept_edges, losses))
        losses, answer = (), (received, kept)


def backward_of_parts(parts: Sequence[Part]) -> Generator[None, None, None]:
    """The backward of ``parts``, last to first, after that of what followed them; pauses while a communication is under
    way."""
    for part in reversed(parts):
        pending = part.exchange.start_backward(*(gradient_or_zeros(tensor) for tensor in part.received))
        yield
        roots: list[tuple[Any, Tensor | None]] = [
            (edge, gradient) for edge, gradient in zip(part.inputs, pending.wait(), strict=True) if edge is not None
        ]
        roots += [(edge, after.grad) for edge, after in part.kept if after.grad is not None]
        roots += [(loss, None) for loss in part.losses]
        backward(roots)


def backward(roots: Sequence[tuple[Any, Tensor | None]]) -> None:
    """Differentiate from pairs of a root (a tensor or an edge) and its gradient; of a loss, a scalar, None is 1."""
    if not roots:
        return
    tensors = tuple(root for root, _ in roots)
    gradients = tuple(_one(root) if gradient is None else gradient for root, gradient in roots)
    if gradients[0].is_cpu:
        # torch.autograd.backward compares shapes as symbolic expressions: 4 us hot, 0.1 ms with cold caches
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward(tensors, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)
    else:  # the engine's threads for GPUs are handed the context of this one there
        torch.autograd.backward(tensors, gradients)


def _one(loss: Tensor) -> Tensor:
    if loss.numel() != 1:
        raise ValueError(f"the loss of a pipeline stage is a scalar, not of shape {list(loss.shape)}")
    return torch.ones_like(loss)


def gradient_or_zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
