"""The dispatcher's messages, each with its backward; something else may compute while they are under way.

Row counts differ from rank to rank. A row travels with its router weight in the same message: the weight's bits follow
the row's last element. One message less each way, for one element (or two) a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class ToExperts:
    """Rows and weights to the ranks that hold their experts; every rank of ``etp`` gets the rows of all of them.

    ``start(rows [S, H], weights [S])`` gives ``[R, H]``, a view with gaps between its rows, and ``[R]``; the weights
    may be of any type at least as wide as the rows'.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self._width, self._dtype = 0, torch.float32

    def start(self, rows_SH: Tensor, weights_S: Tensor) -> InFlight:
        route = self.route
        self._width, self._dtype = rows_SH.shape[1], weights_S.dtype
        return _start(
            _pack(rows_SH, weights_S), route.received, route.sent, route.ep,
            lambda packed: _unpack(_gather(packed, route), self._width, self._dtype),
        )  # fmt: skip

    def start_backward(self, grad_RH: Tensor, grad_R: Tensor) -> InFlight:
        route = self.route
        packed = _pack(grad_RH, grad_R)
        if route.etp.size() > 1:
            rows, weights = _unpack(_scatter(packed, route), self._width, self._dtype)
            packed = _pack(rows.sum(0), weights.sum(0))
        return _start(
            packed, route.sent, route.received, route.ep, lambda packed: _unpack(packed, self._width, self._dtype)
        )


class ToTokens:
    """The way back: the parts of ``etp`` are summed and each row returns to its token's rank, ``[R, H] -> [S, H]``."""

    def __init__(self, route: Route) -> None:
        self.route = route

    def start(self, rows_RH: Tensor) -> InFlight:
        route = self.route
        if route.etp.size() > 1:
            rows_RH = _scatter(rows_RH, route).sum(0)
        return _start(rows_RH, route.sent, route.received, route.ep, lambda rows: (rows,))

    def start_backward(self, grad_SH: Tensor) -> InFlight:
        route = self.route
        return _start(grad_SH, route.received, route.sent, route.ep, lambda rows: (_gather(rows, route),))


class InFlight:
    """An all-to-all under way."""

    def __init__(
        self, received: Tensor, work: dist.Work | None, finish: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> None:
        self._received, self._work, self._finish = received, work, finish

    def wait(self) -> tuple[Tensor, ...]:
        """What came; on a GPU the stream waits and not the host."""
        if self._work is not None:
            self._work.wait()
        return self._finish(self._received)


def _start(
    rows: Tensor,
    receive: Sequence[int],
    send: Sequence[int],
    group: ProcessGroup,
    finish: Callable[[Tensor], tuple[Tensor, ...]],
) -> InFlight:
    if group.size() == 1:
        return InFlight(rows, None, finish)
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    work = dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group, async_op=True)
    return InFlight(received, work, finish)


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
