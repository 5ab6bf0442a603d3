"""Moves tokens to the ranks that hold their experts and the results back, by all-to-all.

A token goes once to each rank that holds at least one of its experts, together with its router weights and experts.
That rank copies it to the rows of its experts, sums their results, and sends one row back::

    T tokens -> S rows sent -> N rows received -> R rows of experts -> N sums -> S sums that come back -> T tokens

Each side copies rows once, into the message (from tokens packed with their weights and experts) and out of it into the
rows of the experts; their places are computed from counts. The counts of all ranks are exchanged once, and the host
waits for them when the message is ready, on a GPU too: an all-to-all wants numbers of rows on the host. Where nothing
leaves the rank there is one copy and one sum, no message and no waiting.

Group-limited routing limits nodes: where ranks of a node stand side by side in ``ep`` and the experts of a group lie on
one node, a token goes to at most ``top_k_groups`` nodes.

In another stack::

    dispatcher = AllToAllDispatcher(num_experts, process_group)
    d = dispatcher.dispatch(hidden_TH, routing_of(experts_TK, weights_TK, num_experts))
    rows_RH = my_experts(d.rows, d.counts) * d.weights[:, None]
    output_TH = dispatcher.combine(rows_RH, d)

Shapes: T local tokens, H hidden, E experts, K experts a token; S, N and R as above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.kernels import check
from r1mega.kernels.combine import combine
from r1mega.kernels.fake import on_host
from r1mega.kernels.permute import RowMap, copy_rows, permute
from r1mega.kernels.route import rank_choices
from r1mega.moe.collectives import Counts
from r1mega.moe.exchanges import ExpertRanks, Plan, ToExperts, ToTokens
from r1mega.moe.router import Routing, counts_of
from r1mega.moe.wire import WIRES, RowFormat
from r1mega.pipeline.exchange import exchange_at_once


def routing_of(experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Routing:
    """What the dispatcher needs of a router of another stack.

    Args:
        experts_TK: ``[T, K]`` integers of any type, different in each row; E marks a dropped choice.
        weights_TK: ``[T, K]``, float32 or wider.
        num_experts: E.

    Raises:
        ValueError: for types or shapes that do not fit, and on a CPU for experts outside of 0 to E.
    """
    check.matrix("experts_TK", experts_TK)
    experts_TK = check.integers("experts_TK", experts_TK)  # with narrower ones the exchanges could not compute
    check.shaped("weights_TK", weights_TK, experts_TK.shape, experts_TK.device)
    check.floating("weights_TK", weights_TK)
    return Routing(experts_TK, weights_TK, *rank_choices(experts_TK, num_experts))


@dataclass
class Dispatch:
    """Some tokens of one layer on their way.

    Args:
        inputs: tokens and their weights; where nothing leaves the rank, rows of the experts and their weights.
        row_map: the rows of each token where nothing leaves the rank.
        plan: the way over other ranks.
        local_counts: rows of each expert where nothing leaves the rank.
        source: the tokens, where nothing leaves the rank and they are kept.
        rows: ``[R, H]``, sorted by local expert; set by :meth:`AllToAllDispatcher.dispatch`.
        weights: ``[R]``, the router's weight of each row; set there, too.
    """

    inputs: tuple[Tensor, Tensor]
    row_map: RowMap | None = None
    plan: Plan | None = None
    local_counts: list[int] | Tensor = field(default_factory=list)
    source: Tensor | None = None
    rows: Tensor | None = None
    weights: Tensor | None = None

    @property
    def counts(self) -> list[int] | Tensor:
        """Rows of each local expert, once :attr:`to_experts` was started; on a GPU a tensor there."""
        if self.plan is None:
            return self.local_counts
        splits = self.plan.splits
        return splits.counts if splits.counts_on_device is None else splits.counts_on_device

    @property
    def to_experts(self) -> ToExperts | None:
        """The exchange that makes rows of the experts of :attr:`inputs`; None where they are that already."""
        return None if self.plan is None else ToExperts(self.plan)

    @property
    def to_tokens(self) -> ToTokens | None:
        """The exchange that sums the experts' rows of each token; None where :meth:`finish` does."""
        return None if self.plan is None else ToTokens(self.plan)

    def finish(self, rows: Tensor) -> Tensor:
        """``[T, H]`` of what :attr:`to_tokens` gave, or of the experts' rows where that is None."""
        return rows if self.row_map is None else combine(rows, self.row_map)

    @property
    def rows_again(self) -> Callable[[], Tensor]:
        """Copies the experts' rows once more from what was kept; holds none of :attr:`inputs`. Not differentiable.

        Raises:
            ValueError: where the dispatcher does not keep them.
        """
        if self.plan is not None and self.plan.keep_source:
            return self.plan.rows_again
        if self.source is None:
            raise ValueError("keep_source=False: this dispatcher keeps nothing to copy rows from again")
        assert self.row_map is not None
        return partial(copy_rows, self.source, self.row_map)


class AllToAllDispatcher:
    """Token dispatch over the expert-parallel group ``ep`` and the group ``etp`` that cuts each expert.

    Args:
        num_experts: E; rank r of ``ep`` holds experts ``r * E / ep`` to ``(r + 1) * E / ep``.
        ep: expert-parallel group.
        etp: the ranks that hold parts of the same experts; None where each expert is whole.
        wire: ``model`` sends rows as they are, ``bfloat16`` in that type; ``float8`` sends towards the experts (tokens,
            and gradients of results in the backward) in float8, and back in bfloat16.
        keep_source: keep what the experts' rows are copied from, for :meth:`Dispatch.rows_again`.

    Raises:
        ValueError: for an unknown wire, and for experts that do not lie evenly on the ranks.
    """

    def __init__(
        self,
        num_experts: int,
        ep: ProcessGroup,
        etp: ProcessGroup | None = None,
        wire: str = "model",
        keep_source: bool = False,
    ) -> None:
        if num_experts % ep.size():
            raise ValueError(f"num_experts={num_experts}: must be a multiple of the ranks of ep ({ep.size()})")
        if wire not in WIRES:
            raise ValueError(f"wire={wire}: must be {', '.join(WIRES[:-1])} or {WIRES[-1]}")
        self.ranks = ExpertRanks(num_experts, ep, None if etp is None or etp.size() == 1 else etp)
        self.wire, self.keep_source = wire, keep_source
        self.is_local = self.ranks.num_sources == 1

    def dispatch(
        self, hidden_TH: Tensor, routing: Routing, may_drop: bool = False, padded_capacity: int | None = None
    ) -> Dispatch:
        """Bring tokens to their experts: ``rows``, ``weights`` and ``counts`` of the result. See :meth:`prepare`."""
        d = self.prepare(hidden_TH, routing, may_drop, padded_capacity)
        d.rows, d.weights = d.inputs if d.plan is None else exchange_at_once(ToExperts(d.plan), *d.inputs)
        return d

    def combine(self, rows_RH: Tensor, d: Dispatch) -> Tensor:
        """Bring the results back, weighted already, and sum those of each token: ``[R, H] -> [T, H]``."""
        return d.finish(rows_RH if d.plan is None else exchange_at_once(ToTokens(d.plan), rows_RH)[0])

    def prepare(
        self, hidden_TH: Tensor, routing: Routing, may_drop: bool = False, padded_capacity: int | None = None
    ) -> Dispatch:
        """All that comes before rows are sent; their counts are on the way when this returns.

        Args:
            hidden_TH: ``[T, H]``.
            routing: experts and weights of each token.
            may_drop: whether some choices are dropped.
            padded_capacity: the most rows of this rank for one expert. All is padded to it, so that shapes are known
                and no counts are exchanged; T must be the same on all ranks then.

        Raises:
            ValueError: for tokens and routing that do not fit each other or this dispatcher; and on a CPU for a
                capacity that is too small.
        """
        self._check(hidden_TH, routing)
        if not self.is_local:
            return self._prepare_parts(hidden_TH, routing, 1, padded_capacity)[0]
        _check_capacity(routing.counts_E, padded_capacity)
        rows, weights, row_map = permute(
            hidden_TH, routing.weights_TK, routing.experts_TK, routing.ranks_TK, routing.counts_E, may_drop,
            padded_capacity, routing.first_row_NE,
        )  # fmt: skip
        counts = routing.counts_E if padded_capacity is None else torch.full_like(routing.counts_E, padded_capacity)
        # A GPU's products read the counts there: the host need not wait for them.
        of_experts = counts.tolist() if on_host(counts) else counts
        source = hidden_TH.detach() if self.keep_source else None
        return Dispatch((rows, weights), row_map, local_counts=of_experts, source=source)

    def prepare_chunks(
        self, hidden_TH: Tensor, routing: Routing, num_chunks: int, padded_capacity: int | None = None
    ) -> list[Dispatch]:
        """:meth:`prepare` with the tokens cut into ``num_chunks`` parts, whose counts are one message.

        Raises:
            ValueError: as :meth:`prepare` does; and where nothing leaves the rank, or there would be no part.
        """
        if self.is_local:
            raise ValueError("ep: has one rank, and no messages to cut into chunks; prepare() is for it")
        if num_chunks < 1:
            raise ValueError(f"num_chunks={num_chunks}: must be at least 1")
        self._check(hidden_TH, routing)
        return self._prepare_parts(hidden_TH, routing, num_chunks, padded_capacity)

    def _prepare_parts(
        self, hidden_TH: Tensor, routing: Routing, num_chunks: int, padded_capacity: int | None
    ) -> list[Dispatch]:
        weights_TK, experts_TK = routing.weights_TK, routing.experts_TK
        top_k = experts_TK.shape[1]
        format = RowFormat(hidden_TH.shape[1], top_k, hidden_TH.dtype, weights_TK.dtype, self.wire)
        # all ranks have the same number of parts, some of them empty perhaps
        parts = experts_TK.tensor_split(num_chunks) if num_chunks > 1 else (experts_TK,)
        plans = [Plan(self.ranks, format, part, padded_capacity, self.keep_source) for part in parts]
        of_experts = [self._counts(part) for part in parts] if num_chunks > 1 else [routing.counts_E]
        for counts_E in of_experts:
            _check_capacity(counts_E, padded_capacity)
        if padded_capacity is None:
            sent = [plan.counts(counts_E) for plan, counts_E in zip(plans, of_experts, strict=True)]
            exchanged = Counts(torch.stack(sent, dim=1), self.ranks.ep, self.ranks.etp)
            for number, plan in enumerate(plans):
                plan.exchanged = exchanged, number
        if num_chunks == 1:
            return [Dispatch((hidden_TH, weights_TK), plan=plans[0])]
        pairs = zip(hidden_TH.tensor_split(num_chunks), weights_TK.tensor_split(num_chunks), strict=True)
        return [Dispatch(inputs, plan=plan) for inputs, plan in zip(pairs, plans, strict=True)]

    def _counts(self, experts_TK: Tensor) -> Tensor:
        num_experts = self.ranks.num_experts
        return counts_of(experts_TK, num_experts + 1)[:num_experts]

    def _check(self, hidden_TH: Tensor, routing: Routing) -> None:
        check.matrix("hidden_TH", hidden_TH)
        check.floating("hidden_TH", hidden_TH)
        choices, device = (hidden_TH.shape[0], *routing.experts_TK.shape[1:]), hidden_TH.device
        check.shaped("routing.experts_TK", routing.experts_TK, choices, device)
        check.shaped("routing.weights_TK", routing.weights_TK, choices, device)
        check.shaped("routing.counts_E", routing.counts_E, (self.ranks.num_experts,), device)


def _check_capacity(counts_E: Tensor, padded_capacity: int | None) -> None:
    """Raises ValueError where an expert's rows would not fit, as far as the host knows: they would overwrite others."""
    if padded_capacity is not None and on_host(counts_E):
        most = int(counts_E.max())
        if most > padded_capacity:
            raise ValueError(f"padded_capacity={padded_capacity}: one expert has {most} rows of this rank")
