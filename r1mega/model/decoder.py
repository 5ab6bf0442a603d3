"""One decoder layer, and the multi-token-prediction layer built around one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r1mega.config import ModelConfig
from r1mega.model.attention import build_attention
from r1mega.model.sequences import Sequences
from r1mega.moe.layer import MoELayer
from r1mega.parallel_state import ParallelState
from r1mega.pipeline.exchange import Steps, keeping
from r1mega.tensor_parallel.feed_forward import FeedForward
from r1mega.tensor_parallel.layers import Linear, RMSNorm

LayerSteps = Steps[tuple[Tensor, dict[str, Tensor]]]


class DecoderLayer(nn.Module):
    """``h += attention(norm(h)); h += feed_forward(norm(h))``. Token-sharded in and out: ``[T / tp, H]``.

    Args:
        config: the model.
        layer: global index; decides between dense and MoE. An MTP layer counts on after the last decoder layer.
        state: the process groups.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        hidden, self.index = config.hidden_size, layer
        self.input_layernorm = RMSNorm(hidden, config.norm_eps, dtype, device)
        self.self_attn = build_attention(config, layer, state, dtype, device)
        self.post_attention_layernorm = RMSNorm(hidden, config.norm_eps, dtype, device)
        self.mlp: MoELayer | FeedForward
        if config.is_moe_layer(layer):
            self.mlp = MoELayer(hidden, config.moe, state, dtype, device)
        else:
            self.mlp = FeedForward(hidden, config.ffn_hidden_size, state, dtype, device)

    def forward(self, hidden_TH: Tensor, sequences: Sequences) -> LayerSteps:
        """Steps (:mod:`r1mega.pipeline.exchange`) that return the new residual stream and the losses by name.

        A generator, so that the layer can pause while its tokens are on their way to the experts and back.

        Args:
            hidden_TH: ``[T / tp, H]``.
            sequences: of the microbatch.
        """
        hidden_TH = hidden_TH + self.self_attn(self.input_layernorm(hidden_TH), sequences)
        normed = self.post_attention_layernorm(hidden_TH)
        if isinstance(self.mlp, FeedForward):
            return hidden_TH + self.mlp(normed), {}
        record = None if sequences.experts is None else sequences.experts.layer(self.index)
        steps = self.mlp.steps(normed, sequences.length, sequences.num_sequences, record, sequences.counted)
        (output, losses), (hidden_TH,) = yield from keeping(steps, hidden_TH)
        return hidden_TH + output, losses


class MTPLayer(nn.Module):
    """Multi-token prediction (DeepSeek-V3, section 2.2): one decoder layer that looks one token further ahead.

    ``norm(layer(eh_proj([enorm(embedding of the next token), hnorm(h)])))``. Embedding and head are the main model's.
    """

    def __init__(self, config: ModelConfig, index: int, state: ParallelState, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.enorm = RMSNorm(hidden, config.norm_eps, dtype, device)
        self.hnorm = RMSNorm(hidden, config.norm_eps, dtype, device)
        self.eh_proj = Linear(2 * hidden, hidden, state, None, dtype=dtype, device=device)
        self.layer = DecoderLayer(config, config.num_layers + index, state, dtype, device)
        self.norm = RMSNorm(hidden, config.norm_eps, dtype, device)

    def forward(self, hidden_TH: Tensor, embedded_TH: Tensor, sequences: Sequences) -> LayerSteps:
        """Steps that return the normalised hidden states, ready for the head, and the losses of the layer.

        Args:
            hidden_TH: ``[T / tp, H]``, normalised hidden states of the model or of the MTP layer before.
            embedded_TH: ``[T / tp, H]``, embedding of the token that this layer sees in addition.
            sequences: of the microbatch.
        """
        both = torch.cat([self.enorm(embedded_TH), self.hnorm(hidden_TH)], dim=-1)
        hidden_TH, losses = yield from self.layer(self.eh_proj(both), sequences)
        return self.norm(hidden_TH), losses
