"""The router: which experts a token goes to, and with which weight.

Shapes: T local tokens, H hidden, E experts, K experts a token, B sequences of the microbatch.
All arithmetic is in float32 or wider; scores, choice and weights follow DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from r1mega.collectives import all_gather
from r1mega.config import MoEConfig
from r1mega.kernels.linear import linear
from r1mega.kernels.parameter import WeightGradients
from r1mega.kernels.route import RouteOptions, rank_choices, route
from r1mega.moe.replay import LayerRecord
from r1mega.parallel_state import ParallelState
from r1mega.tensor_parallel.layers import INITIAL_STD


@dataclass
class Routing:
    """What the router decided.

    Args:
        experts_TK: ``[T, K]`` int64; E marks a choice dropped for capacity.
        weights_TK: ``[T, K]`` float32 or wider; carries the router's gradient.
        ranks_TK: ``[T, K]`` int64, how many earlier choices of these tokens, or of their tile, went to the same expert.
        counts_E: ``[E]`` int64, choices of each expert.
        losses: scalar losses by name, already weighted and divided by global counts.
        first_row_NE: ``[N, E]`` int64, where the rows of each tile and expert begin; None where ranks count all tokens.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    ranks_TK: Tensor
    counts_E: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    first_row_NE: Tensor | None = None


def counts_of(values: Tensor, size: int) -> Tensor:
    """How often each of 0, 1, ... ``size - 1`` occurs, ``[size]`` int64; other values do not.

    It is ``bincount``, which on a GPU waits for the greatest value.
    """
    flat = values.flatten()
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def balance_loss(probabilities_TE: Tensor, counts_BE: Tensor, sequence_T: Tensor, length: int, top_k: int) -> Tensor:
    """This rank's part of the sequence-wise balance loss, summed over sequences (DeepSeek-V3, equations 17-20).

    ``sum_i f_i P_i`` with ``f_i = E / (K length) * counts_i`` and ``P_i`` the mean probability over the sequence.
    Linear in the tokens once the counts are known, so the parts of the ranks that share a sequence add up.

    Args:
        probabilities_TE: ``[T, E]``, scores divided by their sum.
        counts_BE: ``[B, E]``, how often each expert was chosen by the whole sequence.
        sequence_T: ``[T]``, the sequence of each local token.
        length: tokens of a sequence.
        top_k: K.
    """
    fractions_BE = counts_BE.to(probabilities_TE.dtype) * (probabilities_TE.shape[1] / (top_k * length))
    return (probabilities_TE * fractions_BE.index_select(0, sequence_T)).sum() / length


def drop_over_capacity(experts_TK: Tensor, weights_TK: Tensor, length: int, num_experts: int, capacity: int) -> Tensor:
    """Keep, for each sequence and expert, the ``capacity`` tokens with the highest weights; mark the rest with E.

    Args:
        experts_TK: ``[B * length, K]``, whole sequences.
        weights_TK: ``[B * length, K]``.
        length: tokens of a sequence.
        num_experts: E.
        capacity: tokens that an expert takes of a sequence.
    """
    weights_TE = weights_TK.new_full((experts_TK.shape[0], num_experts), -1.0)
    weights_TE.scatter_(1, experts_TK, weights_TK.detach())
    by_sequence = weights_TE.view(-1, length, num_experts)
    best = by_sequence.topk(min(capacity, length), dim=1).indices
    kept = torch.zeros_like(by_sequence, dtype=torch.bool).scatter_(1, best, True).flatten(0, 1)
    return experts_TK.masked_fill(~kept.gather(1, experts_TK), num_experts)


class Router(nn.Module):
    """Scores, choice, weights, balance statistics and losses. Its weight is whole on every rank.

    ``tokens_per_expert`` counts the choices of this rank's tokens since it was last reset, in integers: their sum is
    exact in any order.
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
        self.options = RouteOptions(
            config.top_k,
            config.score_function,
            config.num_groups,
            config.top_k_groups,
            config.normalize_top_k,
            config.routed_scaling_factor,
        )
        self.weight_gradients: WeightGradients | None = None
        self.group: ProcessGroup = state.group("tp")
        self.weight = nn.Parameter(
            INITIAL_STD * torch.randn(config.num_experts, hidden_size, dtype=dtype, device=device)
        )
        self.e_score_correction_bias: Tensor | None
        self.tokens_per_expert: Tensor
        bias = torch.zeros(config.num_experts, dtype=torch.float32, device=device) if config.score_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        counts = torch.zeros(config.num_experts, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def forward(
        self,
        hidden_TH: Tensor,
        length: int,
        num_sequences: int,
        record: LayerRecord | None = None,
        counted: Tensor | None = None,
    ) -> Routing:
        """Route ``[T, H]`` local tokens.

        Args:
            hidden_TH: consecutive tokens of the microbatch; rank r of the tensor-parallel group holds the r-th part.
            length: tokens of a sequence.
            num_sequences: sequences of the whole global batch, the normaliser of the losses.
            record: of this layer, to be filled or repeated.
            counted: bool for every token of the microbatch, those of other ranks too: whether it counts in
                ``tokens_per_expert``; None counts all.
        """
        config = self.config
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        if self.weight.dtype == wide:
            logits = linear(hidden_TH, self.weight, self.weight_gradients)
        else:
            logits = linear(hidden_TH.to(wide), self.weight.to(wide))
        with_losses = torch.is_grad_enabled()
        repeats = record is not None and record.is_filled
        with_scores = config.force_balance or repeats or (with_losses and config.aux_loss_coefficient != 0)
        chosen = route(logits, self.e_score_correction_bias, self.options, with_scores)
        routing = Routing(
            chosen.experts_TK, chosen.weights_TK, chosen.ranks_TK, chosen.counts_E, first_row_NE=chosen.first_row_NE
        )
        first = self.group.rank() * hidden_TH.shape[0]
        position = torch.arange(first, first + hidden_TH.shape[0], device=hidden_TH.device)
        if config.force_balance:
            slots = position.unsqueeze(1) * config.top_k + torch.arange(config.top_k, device=position.device)
            self._force(routing, chosen.scores_TE, slots % config.num_experts)
        if record is not None and (experts := record.replace(routing.experts_TK, first)) is not None:
            self._force(routing, chosen.scores_TE, experts)
        if with_losses:
            self._count(routing, None if counted is None else counted.flatten()[first : first + hidden_TH.shape[0]])
            self._add_losses(routing, logits, chosen.scores_TE, position // length, length, num_sequences)
        if config.capacity_factor is not None:
            self._drop(routing, length)
        return routing

    def _force(self, routing: Routing, scores: Tensor | None, experts_TK: Tensor) -> None:
        """Put other experts into ``routing``, with the weights that their scores give."""
        assert scores is not None
        config = self.config
        routing.experts_TK = experts_TK
        weights = scores.gather(1, experts_TK)
        if config.normalize_top_k:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        routing.weights_TK = weights * config.routed_scaling_factor
        self._rank(routing)

    def _count(self, routing: Routing, counted_T: Tensor | None) -> None:
        if counted_T is None:
            self.tokens_per_expert += routing.counts_E
        else:
            slots = counted_T.to(torch.int64).unsqueeze(1).expand_as(routing.experts_TK)
            self.tokens_per_expert.index_add_(0, routing.experts_TK.flatten(), slots.flatten())

    def _add_losses(
        self,
        routing: Routing,
        logits: Tensor,
        scores: Tensor | None,
        sequence_T: Tensor,
        length: int,
        num_sequences: int,
    ) -> None:
        config = self.config
        if config.aux_loss_coefficient:
            assert scores is not None
            probabilities = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
            counts = self._counts_of_sequences(routing.experts_TK, sequence_T, length)
            loss = balance_loss(probabilities, counts, sequence_T, length, config.top_k)
            routing.losses["aux_loss"] = loss * (config.aux_loss_coefficient / num_sequences)
        if config.z_loss_coefficient:
            loss = logits.logsumexp(dim=-1).square().sum()
            routing.losses["z_loss"] = loss * (config.z_loss_coefficient / (num_sequences * length))

    def _rank(self, routing: Routing) -> None:
        """Ranks and counts of other experts than the kernel chose."""
        routing.ranks_TK, routing.counts_E = rank_choices(routing.experts_TK, self.config.num_experts)
        routing.first_row_NE = None

    def _counts_of_sequences(self, experts_TK: Tensor, sequence_T: Tensor, length: int) -> Tensor:
        num_sequences = experts_TK.shape[0] * self.group.size() // length
        slots = sequence_T.unsqueeze(1) * self.config.num_experts + experts_TK
        counts = counts_of(slots, num_sequences * self.config.num_experts)
        if self.group.size() > 1:
            dist.all_reduce(counts, group=self.group)
        return counts.view(num_sequences, self.config.num_experts)

    @torch.no_grad()
    def _drop(self, routing: Routing, length: int) -> None:
        config = self.config
        experts, weights = routing.experts_TK, routing.weights_TK.detach()
        if self.group.size() > 1:
            experts, weights = all_gather(experts, self.group), all_gather(weights, self.group)
        capacity = expert_capacity(config, length)
        experts = drop_over_capacity(experts, weights, length, config.num_experts, capacity)
        routing.experts_TK = experts.chunk(self.group.size())[self.group.rank()]
        self._rank(routing)


def expert_capacity(config: MoEConfig, length: int) -> int:
    """Tokens that one expert takes of a sequence of ``length`` tokens."""
    assert config.capacity_factor is not None
    return math.ceil(config.capacity_factor * config.top_k * length / config.num_experts)
