"""Exchanges that are started now and waited for later, forward and backward, in one graph of autograd.

In the backward the wait comes first: it starts the message of the gradients, and the start waits for it. Autograd goes
through a graph in the opposite order of its making, so what stood between start and wait in the forward has its
backward between them, too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1mega.pipeline.exchange import Exchange, Pending, Tensors


class Begun:
    """An exchange that was started; see :func:`begin`."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.pending: Pending | None = None
        self.tie: Tensor | None = None

    def wait(self) -> Tensors:
        """What the exchange brought; differentiable."""
        received: Tensors = _Wait.apply(self, self.tie)
        return received


def begin(exchange: Exchange, *inputs: Tensor) -> Begun:
    """Start ``exchange``; :meth:`Begun.wait` is to be called once."""
    begun = Begun(exchange)
    begun.tie = _Begin.apply(begun, *inputs)
    return begun


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, begun, *inputs):
        ctx.begun = begun
        begun.pending = begun.exchange.start(*inputs)
        return inputs[0].new_empty(0)  # what ties the wait to this

    @staticmethod
    @once_differentiable
    def backward(ctx, _tie):
        return None, *ctx.begun.pending.wait()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, begun, tie):
        ctx.begun = begun
        begun.tie = None
        received = begun.pending.wait()
        begun.pending = None
        return received

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        begun = ctx.begun
        begun.pending = begun.exchange.start_backward(*gradients)
        return None, gradients[0].new_empty(0)
