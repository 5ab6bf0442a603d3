"""The dispatcher's messages, each with its backward. Row counts differ from rank to rank.

A row travels with its router weight in the same message: the weight's bits follow the row's last element. One message
less each way, for one element (or two) a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass
class Route:
    """Who sends how many rows to whom.

    Args:
        ep: the expert-parallel group.
        etp: the ranks that hold parts of the same experts.
        sent: ``[ep]`` rows that go to each rank.
        received: ``[ep]`` rows that come from each rank.
        gathered: ``[etp]`` rows that each rank of ``etp`` received.
    """

    ep: ProcessGroup
    etp: ProcessGroup
    sent: list[int]
    received: list[int]
    gathered: list[int]


def send_to_experts(rows_SH: Tensor, weights_S: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """Rows and weights to the ranks that hold their experts; every rank of ``etp`` gets the rows of all of them.

    Args:
        rows_SH: ``[S, H]``, sorted by rank.
        weights_S: ``[S]``, of any type at least as wide as the rows'.
        route: the counts.

    Returns:
        ``[R, H]``, a view with gaps between its rows, and ``[R]``.
    """
    return _SendToExperts.apply(rows_SH, weights_S, route)


def send_to_tokens(rows_RH: Tensor, route: Route) -> Tensor:
    """The way back: the parts of ``etp`` are summed and each row returns to its token's rank, ``[R, H] -> [S, H]``."""
    return _SendToTokens.apply(rows_RH, route)


def _exchange(rows: Tensor, receive: Sequence[int], send: Sequence[int], group: ProcessGroup) -> Tensor:
    if group.size() == 1:
        return rows
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


# gloo has neither an all-gather nor a reduce-scatter of unequal parts, so both are an all-to-all.
def _gather(rows: Tensor, route: Route) -> Tensor:
    size = route.etp.size()
    if size == 1:
        return rows
    return _exchange(rows.repeat(size, 1), route.gathered, [rows.shape[0]] * size, route.etp)


def _scatter(rows: Tensor, route: Route) -> Tensor:
    """``[etp, rows of this rank, ...]``: what each rank of ``etp`` has for this one, still to be summed."""
    size, mine = route.etp.size(), route.gathered[route.etp.rank()]
    return _exchange(rows, [mine] * size, route.gathered, route.etp).unflatten(0, (size, mine))


def _pack(rows: Tensor, weights: Tensor) -> Tensor:
    columns = weights.element_size() // rows.element_size()
    return torch.cat([rows, weights.contiguous().view(rows.dtype).view(-1, columns)], dim=1)


def _unpack(packed: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return packed[..., :width], packed[..., width:].contiguous().view(dtype).squeeze(-1)


class _SendToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, route):
        ctx.route, ctx.width, ctx.dtype = route, rows.shape[1], weights.dtype
        packed = _gather(_exchange(_pack(rows, weights), route.received, route.sent, route.ep), route)
        return _unpack(packed, ctx.width, ctx.dtype)

    @staticmethod
    def backward(ctx, grad_rows, grad_weights):
        route = ctx.route
        packed = _pack(grad_rows, grad_weights)
        if route.etp.size() > 1:
            rows, weights = _unpack(_scatter(packed, route), ctx.width, ctx.dtype)
            packed = _pack(rows.sum(0), weights.sum(0))
        return *_unpack(_exchange(packed, route.sent, route.received, route.ep), ctx.width, ctx.dtype), None


class _SendToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, route):
        ctx.route = route
        if route.etp.size() > 1:
            rows = _scatter(rows, route).sum(0)
        return _exchange(rows, route.sent, route.received, route.ep)

    @staticmethod
    def backward(ctx, grad):
        route = ctx.route
        return _gather(_exchange(grad, route.received, route.sent, route.ep), route), None
