"""The mixture-of-experts feed-forward of a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r1mega.config import MoEConfig
from r1mega.moe.dispatcher import AllToAllDispatcher, Dispatch
from r1mega.moe.exchanges import ToExperts, ToTokens
from r1mega.moe.experts import Experts
from r1mega.moe.overlap import begin
from r1mega.moe.replay import LayerRecord
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
        self.dispatcher = AllToAllDispatcher(
            config.num_experts, state.group("ep"), state.group("etp"), config.wire, config.recompute
        )

    def forward(self, hidden_TH: Tensor, length: int, num_sequences: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the output and the router's losses.

        Args:
            hidden_TH: ``[T / tp, H]``.
            length: tokens of a sequence.
            num_sequences: sequences of the whole global batch.
        """
        return at_once(self.steps(hidden_TH, length, num_sequences))[0]

    def steps(
        self,
        hidden_TH: Tensor,
        length: int,
        num_sequences: int,
        record: LayerRecord | None = None,
        counted: Tensor | None = None,
    ) -> Steps[tuple[Tensor, dict[str, Tensor]]]:
        """:meth:`forward`, cut at its two exchanges; the losses belong to the first cut.

        With ``moe.chunks`` nothing pauses: the exchanges of one chunk run under the experts of the others instead.
        ``record`` and ``counted`` are the router's.
        """
        routing = self.gate(hidden_TH, length, num_sequences, record, counted)
        if self.config.chunks > 1 and not self.dispatcher.is_local:
            _, (hidden_TH,) = yield Cut((), None, (hidden_TH,), tuple(routing.losses.values()))
            return self._in_chunks(hidden_TH, routing, self._capacity(hidden_TH, length)), routing.losses
        may_drop = self.config.capacity_factor is not None
        d = self.dispatcher.prepare(hidden_TH, routing, may_drop, self._capacity(hidden_TH, length))
        kept: tuple[Tensor, ...] = () if self.shared_experts is None else (hidden_TH,)
        (rows, weights), kept = yield Cut(d.inputs, d.to_experts, kept, tuple(routing.losses.values()))
        (rows,), kept = yield Cut((self._run_experts(d, rows, weights),), d.to_tokens, kept)
        output = d.finish(rows)
        if self.shared_experts is not None:
            output = output + self.shared_experts(*kept)
        return output, routing.losses

    def _in_chunks(self, hidden_TH: Tensor, routing: Routing, capacity: int | None) -> Tensor:
        """All chunks set out at once; each comes back as soon as its experts have run."""
        chunks = self.dispatcher.prepare_chunks(hidden_TH, routing, self.config.chunks, capacity)
        plans = [d.plan for d in chunks if d.plan is not None]
        going = [begin(ToExperts(plan), *d.inputs) for d, plan in zip(chunks, plans, strict=True)]
        shared = None if self.shared_experts is None else self.shared_experts(hidden_TH)
        coming = []
        for d, plan, begun in zip(chunks, plans, going, strict=True):
            rows, weights = begun.wait()
            coming.append(begin(ToTokens(plan), self._run_experts(d, rows, weights)))
        output = torch.cat([begun.wait()[0] for begun in coming])
        return output if shared is None else output + shared

    def _run_experts(self, d: Dispatch, rows: Tensor, weights: Tensor) -> Tensor:
        return self.experts(rows, weights, d.counts, d.rows_again if self.config.recompute else None)

    def _capacity(self, hidden_TH: Tensor, length: int) -> int | None:
        """What each expert is padded to for the tokens of one rank; None pads nothing."""
        if not self.config.pad_to_capacity:
            return None
        sequences = hidden_TH.shape[0] * self.gate.group.size() // length
        return min(hidden_TH.shape[0], sequences * expert_capacity(self.config, length))
