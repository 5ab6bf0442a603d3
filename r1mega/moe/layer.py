"""The mixture-of-experts feed-forward of a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r1mega.config import MoEConfig
from r1mega.moe.dispatcher import AllToAllDispatcher, Dispatch
from r1mega.moe.experts import Experts
from r1mega.moe.router import Router, Routing, expert_capacity
from r1mega.parallel_state import ParallelState
from r1mega.pipeline.exchange import Cut, Steps, at_once
from r1mega.tensor_parallel.feed_forward import FeedForward


class MoELayer(nn.Module):
    """Router, dispatch, routed experts, combine; plus the shared expert.

    Token-sharded in and out: ``[T / tp, H] -> [T / tp, H]``. ``forward`` runs :meth:`steps` at once; an executor that
    overlaps two microbatches runs them one by one.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        state: ParallelState,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(hidden_size, config, state, dtype, device)
        self.experts = Experts(hidden_size, config, state, dtype, device)
        shared_width = config.num_shared_experts * config.ffn_hidden_size
        self.shared_experts = FeedForward(hidden_size, shared_width, state, dtype, device) if shared_width else None
        self.dispatcher = AllToAllDispatcher(config.num_experts, state.group("ep"), state.group("etp"))

    def forward(self, hidden_TH: Tensor, length: int, num_sequences: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the output and the router's losses.

        Args:
            hidden_TH: ``[T / tp, H]``.
            length: tokens of a sequence.
            num_sequences: sequences of the whole global batch.
        """
        return at_once(self.steps(hidden_TH, length, num_sequences))[0]

    def steps(self, hidden_TH: Tensor, length: int, num_sequences: int) -> Steps[tuple[Tensor, dict[str, Tensor]]]:
        """:meth:`forward`, cut at its two exchanges; the losses belong to the first cut."""
        routing = self.gate(hidden_TH, length, num_sequences)
        d = self._prepare(hidden_TH, routing, length)
        to_experts = self.dispatcher.to_experts(d)
        (d.rows, d.weights), (hidden_TH,) = yield Cut(
            (d.rows, d.weights), to_experts, (hidden_TH,), tuple(routing.losses.values())
        )
        d = self.dispatcher.dispatch_finish(d)
        rows = self.dispatcher.combine_prepare(self.experts(d.rows, d.weights, d.counts), d)
        (rows,), (hidden_TH,) = yield Cut((rows,), self.dispatcher.to_tokens(d), (hidden_TH,))
        output = self.dispatcher.combine_finish(rows, d)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_TH)
        return output, routing.losses

    def _prepare(self, hidden_TH: Tensor, routing: Routing, length: int) -> Dispatch:
        may_drop, capacity = self.config.capacity_factor is not None, None
        if self.config.pad_to_capacity:
            sequences = hidden_TH.shape[0] * self.gate.group.size() // length
            capacity = min(hidden_TH.shape[0], sequences * expert_capacity(self.config, length))
        return self.dispatcher.dispatch_prepare(hidden_TH, routing, may_drop, capacity)
