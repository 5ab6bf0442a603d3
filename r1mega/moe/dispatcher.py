"""Moves tokens to the ranks that hold their experts and the results back, by all-to-all.

Each way has three steps, so that an executor can put other work under the communication::

    dispatch    prepare (rows by expert)        communicate (exchange)   finish (rows of one expert together)
    combine     prepare (order of arrival)      communicate (exchange)   finish (sum the rows of each token)

Shapes: T local tokens, H hidden, E experts, K experts a token, S routed rows sent, R routed rows received.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.collectives import all_gather
from r1mega.kernels.combine import combine
from r1mega.kernels.permute import RowMap, permute, reorder
from r1mega.moe.collectives import Route, ToExperts, ToTokens
from r1mega.moe.router import Routing
from r1mega.pipeline.exchange import exchange_at_once


@dataclass
class Dispatch:
    """One microbatch's rows on their way through one layer.

    Args:
        rows: ``[S or R, H]`` at the present step.
        weights: ``[S or R]``, the router's weight of each row.
        row_map: which rows belong to which token.
        sent_counts: ``[E]`` rows of this rank for each expert.
        counts: ``[local experts]`` rows of each local expert.
        route: who sends how much to whom; None where nothing leaves the rank.
        order: the permutation from the order of arrival to expert order, and its inverse; None where they are the same.
    """

    rows: Tensor
    weights: Tensor
    row_map: RowMap
    sent_counts: Tensor
    counts: list[int] = field(default_factory=list)
    route: Route | None = None
    order: tuple[Tensor, Tensor] | None = None


class AllToAllDispatcher:
    """Token dispatch over the expert-parallel group ``ep`` and the group ``etp`` that cuts each expert.

    Args:
        num_experts: E; rank r of ``ep`` holds experts ``r * E / ep`` to ``(r + 1) * E / ep``.
        ep: expert-parallel group.
        etp: group of the ranks that hold parts of the same experts.
    """

    def __init__(self, num_experts: int, ep: ProcessGroup, etp: ProcessGroup) -> None:
        self.num_experts, self.ep, self.etp = num_experts, ep, etp
        self.local_experts = num_experts // ep.size()

    def dispatch(
        self, hidden_TH: Tensor, routing: Routing, may_drop: bool = False, padded_capacity: int | None = None
    ) -> Dispatch:
        """All three steps of the dispatch. Returns rows and weights sorted by local expert."""
        d = self.dispatch_prepare(hidden_TH, routing, may_drop, padded_capacity)
        return self.dispatch_finish(self.dispatch_communicate(d))

    def combine(self, rows_RH: Tensor, d: Dispatch) -> Tensor:
        """All three steps of the combine: ``[R, H] -> [T, H]``."""
        return self.combine_finish(self.combine_communicate(self.combine_prepare(rows_RH, d), d), d)

    def dispatch_prepare(
        self, hidden_TH: Tensor, routing: Routing, may_drop: bool = False, padded_capacity: int | None = None
    ) -> Dispatch:
        """Copy tokens to routed rows, sorted by expert.

        Args:
            hidden_TH: ``[T, H]``.
            routing: experts and weights of each token.
            may_drop: whether some choices are dropped.
            padded_capacity: pad the rows of each expert to this many.
        """
        counts = routing.counts_E
        rows, weights, row_map = permute(
            hidden_TH, routing.weights_TK, routing.experts_TK, routing.ranks_TK, counts, may_drop, padded_capacity,
            routing.first_row_NE,
        )  # fmt: skip
        if padded_capacity is not None:
            counts = torch.full_like(counts, padded_capacity)
        return Dispatch(rows, weights, row_map, counts)

    def dispatch_communicate(self, d: Dispatch) -> Dispatch:
        """Exchange counts, then rows and weights. The counts are read on the host here."""
        exchange = self.to_experts(d)
        if exchange is not None:
            d.rows, d.weights = exchange_at_once(exchange, d.rows, d.weights)
        return d

    def to_experts(self, d: Dispatch) -> ToExperts | None:
        """Exchange the counts; what is left to exchange is rows and weights. None where nothing leaves the rank."""
        if self.ep.size() == 1 and self.etp.size() == 1:
            d.counts = d.sent_counts.tolist()
            return None
        sent = d.sent_counts.view(self.ep.size(), self.local_experts)
        received = _exchange_counts(sent, self.ep)
        gathered = _gather_counts(received, self.etp)
        totals = sent.sum(1).tolist(), received.sum(1).tolist(), gathered.sum((1, 2)).tolist()
        d.counts = gathered.sum((0, 1)).tolist()
        d.route = Route(self.ep, self.etp, *totals)
        d.order = _expert_order(gathered.flatten(0, 1), d.rows.device)
        return ToExperts(d.route)

    def dispatch_finish(self, d: Dispatch) -> Dispatch:
        """Bring the rows of each local expert together."""
        if d.order is not None:
            d.rows, d.weights = reorder(d.rows, *d.order), reorder(d.weights, *d.order)
        d.rows = d.rows.contiguous()
        return d

    def combine_prepare(self, rows_RH: Tensor, d: Dispatch) -> Tensor:
        """Back into the order of arrival."""
        return rows_RH if d.order is None else reorder(rows_RH, *reversed(d.order))

    def combine_communicate(self, rows_RH: Tensor, d: Dispatch) -> Tensor:
        """Sum the parts of each expert and send the rows back to their tokens' rank."""
        exchange = self.to_tokens(d)
        return rows_RH if exchange is None else exchange_at_once(exchange, rows_RH)[0]

    def to_tokens(self, d: Dispatch) -> ToTokens | None:
        """The exchange that :meth:`combine_communicate` does; None where nothing left the rank."""
        return None if d.route is None else ToTokens(d.route)

    def combine_finish(self, rows_SH: Tensor, d: Dispatch) -> Tensor:
        """Sum the rows of each token (the experts applied the weights): ``[S, H] -> [T, H]``."""
        return combine(rows_SH, d.row_map)


def _exchange_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """``[ep, local experts]`` to send, to ``[ep, local experts]`` to receive."""
    if group.size() == 1:
        return counts
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def _gather_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """``[etp, ep, local experts]``: what each rank that shares these experts received."""
    if group.size() == 1:
        return counts.unsqueeze(0)
    return all_gather(counts.unsqueeze(0), group)


def _expert_order(counts: Tensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The permutation from (source, expert) to (expert, source) order of row blocks, and its inverse.

    Args:
        counts: ``[sources, local experts]`` rows of each block.
        device: of the result.
    """
    if counts.shape[0] == 1 or counts.shape[1] == 1:
        return None
    blocks = torch.arange(int(counts.sum()), device=device).split(counts.flatten().tolist())
    experts = counts.shape[1]
    order = torch.cat([block for expert in range(experts) for block in blocks[expert::experts]])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=device)
    return order, inverse
