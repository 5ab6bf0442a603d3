"""The two exchanges of a layer, each with its backward: tokens to experts, and results to tokens.

Neither is an operation of autograd: :mod:`r1mega.pipeline.exchange` makes one of them, or pauses between their halves.
Shapes: T tokens, S rows sent, N rows received, R rows of experts, H hidden, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.kernels.combine import combine
from r1mega.kernels.permute import RowMap, copy_rows, permute
from r1mega.kernels.route import rank_choices
from r1mega.moe.collectives import Counts, InFlight, Splits, gather, scatter, start_exchange
from r1mega.moe.wire import RowFormat


def once_per_rank(experts_TK: Tensor, local_experts: int, num_ranks: int) -> Tensor:
    """The rank of each choice, ``[T, K]``; ``num_ranks`` marks one whose token goes there already, or is dropped."""
    ranks_TK = experts_TK.div(local_experts, rounding_mode="floor")
    again = ranks_TK.unsqueeze(2).eq(ranks_TK.unsqueeze(1)).tril_(-1).any(2)
    return ranks_TK.masked_fill_(again, num_ranks)


@dataclass
class ExpertRanks:
    """Who holds which experts.

    Args:
        num_experts: E; rank r of ``ep`` holds experts ``r * E / ep`` to ``(r + 1) * E / ep``.
        ep: expert-parallel group.
        etp: the ranks that hold parts of the same experts; None where there is only this one.
    """

    num_experts: int
    ep: ProcessGroup
    etp: ProcessGroup | None
    _table: Tensor | None = None

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ep.size()

    @property
    def num_sources(self) -> int:
        """Ranks whose rows a rank's experts see."""
        return self.ep.size() * (1 if self.etp is None else self.etp.size())

    def local_ids(self, experts_NK: Tensor) -> Tensor:
        """Local expert of experts counted from 1, ``[N, K]`` int64; their number marks an expert of another rank."""
        if self._table is None or self._table.device != experts_NK.device:
            self._table = torch.full((self.num_experts + 2,), self.local_experts, device=experts_NK.device)
            first = 1 + self.ep.rank() * self.local_experts
            local = torch.arange(self.local_experts, device=experts_NK.device)
            self._table[first : first + self.local_experts] = local
        return self._table.index_select(0, experts_NK.flatten()).view(experts_NK.shape)


class Plan:
    """The way of some tokens to their experts and back, over other ranks.

    Args:
        ranks: who holds which experts.
        format: of the messages.
        experts_TK: ``[T, K]`` int64; E marks a dropped choice.
        capacity: the most rows of this rank for one expert, to which everything is padded; None pads nothing.
        keep_source: keep what came, for :meth:`rows_again`.
    """

    def __init__(
        self, ranks: ExpertRanks, format: RowFormat, experts_TK: Tensor, capacity: int | None, keep_source: bool
    ) -> None:
        self.ranks, self.format, self.capacity, self.keep_source = ranks, format, capacity, keep_source
        self.experts_TK: Tensor | None = experts_TK
        self.num_tokens = experts_TK.shape[0]
        self.token_map: RowMap | None = None  # None: each token is sent once, in order
        self.expert_map: RowMap | None = None
        self.source: Tensor | None = None
        self.exchanged: tuple[Counts, int] | None = None  # and which chunk of the tokens this is
        if ranks.ep.size() > 1:
            self._destinations = once_per_rank(experts_TK, ranks.local_experts, ranks.ep.size())
            self._ranks, self.rows_of_rank = rank_choices(self._destinations, ranks.ep.size())
        else:
            self.rows_of_rank = experts_TK.new_full((1,), self.num_tokens)

    def counts(self, counts_E: Tensor) -> Tensor:
        """``[ep, 1 + local experts]``: rows for each rank, and for each of its experts."""
        of_experts = counts_E.view(self.ranks.ep.size(), self.ranks.local_experts)
        return torch.cat([self.rows_of_rank.unsqueeze(1), of_experts], dim=1)

    @cached_property
    def splits(self) -> Splits:
        if self.exchanged is not None:
            counts, chunk = self.exchanged
            self.exchanged = None
            return counts.of_chunk(chunk)
        assert self.capacity is not None, "the counts were not exchanged"
        ranks, rows = self.ranks, self.num_tokens
        if ranks.ep.size() > 1:
            rows = min(rows, self.capacity * ranks.local_experts)
        each, num_etp = [rows] * ranks.ep.size(), ranks.num_sources // ranks.ep.size()
        of_experts = [self.capacity * ranks.num_sources] * ranks.local_experts
        on_device = None
        if self.rows_of_rank.is_cuda:
            on_device = self.rows_of_rank.new_full((ranks.local_experts,), of_experts[0])
        return Splits(each, each, [sum(each)] * num_etp, of_experts, on_device)

    def leave(self, message_TW: Tensor) -> Tensor:
        """One row for each token and rank that it goes to: ``[T, W] -> [S, W]``.

        The first time the host reads the counts here, after the copy, which runs while they travel.
        """
        if self.ranks.ep.size() == 1:
            return message_TW
        if self.token_map is None:
            self.token_map = self._place_tokens()
        message_SW, self.token_map.num_rows = copy_rows(message_TW, self.token_map), sum(self.splits.sent)
        return message_SW[: self.token_map.num_rows]

    def _place_tokens(self) -> RowMap:
        """Where the tokens stand in the message. Its number of rows is S at least: a GPU would be waited for."""
        (num_tokens, top_k), num_ranks = self._destinations.shape, self.ranks.ep.size()
        padded, rows, num_rows = self.capacity is not None, self.rows_of_rank, num_tokens * min(top_k, num_ranks)
        if padded:
            rows, num_rows = torch.full_like(rows, self.splits.sent[0]), sum(self.splits.sent)
        first_row = torch.cat([rows.new_zeros(1), rows.cumsum(0)])  # the last one is of no rank
        places = first_row[self._destinations].add_(self._ranks).masked_fill_(self._destinations == num_ranks, -1)
        del self._destinations, self._ranks
        return RowMap(places, num_rows, True, padded)

    def arrive(self, message_NW: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and weights of the local experts, ``[R, H]`` and ``[R]``, both dense.

        A token came once, although several experts of this rank may want it. No order of sending puts one row into
        several places, so one copy on this side has to, and that copy *is* the placement by expert: it reads the rows
        out of the message, where weights and experts stand between them, and writes them where they belong, without
        gaps. Nothing moves them again before the experts. (What a narrower wire brought is decoded before, N rows.)
        """
        source, weights_NK, experts_NK = self.format.unpack(message_NW)
        local_NK = self.ranks.local_ids(experts_NK)
        capacity = None if self.capacity is None else self.capacity * self.ranks.num_sources
        places = rank_choices(local_NK, self.ranks.local_experts)
        num_rows = sum(self.splits.counts)  # the host knows it: a GPU need not be asked
        rows, weights_R, self.expert_map = permute(
            source, weights_NK, local_NK, *places, True, capacity, num_rows=num_rows
        )
        if self.keep_source:
            self.source = source
        return rows, weights_R

    def rows_again(self) -> Tensor:
        """The rows that :meth:`arrive` gave."""
        assert self.source is not None and self.expert_map is not None
        return copy_rows(self.source, self.expert_map)

    def sum_of_token(self, rows_SH: Tensor) -> Tensor:
        """``[S, H] -> [T, H]``"""
        return rows_SH if self.token_map is None else combine(rows_SH, self.token_map)

    def sum_of_received(self, rows_RH: Tensor) -> Tensor:
        """``[R, H] -> [N, H]``"""
        assert self.expert_map is not None
        return combine(rows_RH, self.expert_map)

    def copies_of_received(self, rows_NH: Tensor) -> Tensor:
        """``[N, H] -> [R, H]``"""
        assert self.expert_map is not None
        return copy_rows(rows_NH, self.expert_map)

    def gather_etp(self, rows: Tensor) -> Tensor:
        """The rows of all ranks that hold parts of the same experts."""
        return rows if self.ranks.etp is None else gather(rows, self.splits.gathered, self.ranks.etp)

    def towards_experts(self, rows: Tensor, finish: Callable[[Tensor], tuple[Tensor, ...]]) -> InFlight:
        return start_exchange(rows, self.splits.received, self.splits.sent, self.ranks.ep, finish)

    def towards_tokens(self, rows: Tensor, finish: Callable[[Tensor], tuple[Tensor, ...]]) -> InFlight:
        return start_exchange(rows, self.splits.sent, self.splits.received, self.ranks.ep, finish)


class ToExperts:
    """Tokens ``[T, H]`` and their weights ``[T, K]`` to rows ``[R, H]`` and weights ``[R]`` of the local experts."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def start(self, hidden_TH: Tensor, weights_TK: Tensor) -> InFlight:
        plan = self.plan
        assert plan.experts_TK is not None
        message = plan.leave(plan.format.pack(hidden_TH, weights_TK, plan.experts_TK))
        plan.experts_TK = None
        return plan.towards_experts(message, lambda message: plan.arrive(plan.gather_etp(message)))

    def start_backward(self, grad_RH: Tensor, grad_R: Tensor) -> InFlight:
        plan, format, etp = self.plan, self.plan.format, self.plan.ranks.etp
        assert plan.expert_map is not None
        grads = plan.sum_of_received(grad_RH), _of_choices(grad_R, plan.expert_map)
        if etp is not None:
            parts = scatter(format.pack_gradients(*grads, "model"), plan.splits.gathered, etp)
            rows, weights = format.unpack_gradients(parts, "model")
            grads = rows.sum(0), weights.sum(0)
        return plan.towards_tokens(format.pack_gradients(*grads, format.wire_back), self._finish_backward)

    def _finish_backward(self, message: Tensor) -> tuple[Tensor, Tensor]:
        plan, format = self.plan, self.plan.format
        if format.adds_up:
            return format.unpack_gradients(plan.sum_of_token(message), format.wire_back)
        rows, weights = format.unpack_gradients(message, format.wire_back)
        return plan.sum_of_token(rows), plan.sum_of_token(weights)


class ToTokens:
    """The experts' rows ``[R, H]`` to the sum of each token's, ``[T, H]``."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def start(self, rows_RH: Tensor) -> InFlight:
        plan, format = self.plan, self.plan.format
        rows = plan.sum_of_received(rows_RH)
        if plan.ranks.etp is not None:
            rows = scatter(rows, plan.splits.gathered, plan.ranks.etp).sum(0)
        return plan.towards_tokens(
            format.pack_rows(rows, format.wire_back),
            lambda message: (plan.sum_of_token(format.unpack_rows(message, format.wire_back)),),
        )

    def start_backward(self, grad_TH: Tensor) -> InFlight:
        plan, format = self.plan, self.plan.format
        return plan.towards_experts(
            plan.leave(format.pack_rows(grad_TH, format.wire)),
            lambda message: (plan.copies_of_received(format.unpack_rows(plan.gather_etp(message), format.wire)),),
        )


def _of_choices(grad_R: Tensor, row_map: RowMap) -> Tensor:
    """The gradient of each choice's weight, ``[N, K]``; zero for those of other ranks, whose row is -1."""
    return torch.cat([grad_R, grad_R.new_zeros(1)])[row_map.row_of_choice]
