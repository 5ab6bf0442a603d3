"""Attention: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) and grouped-query attention.

Where ``sequences.cache`` is set, tokens leave an entry there (``r1mega.model.cache``): prompts are read by the
training's own forward, and then each row goes on by one token at a time, which attends to the entries.

Shapes: T tokens of the microbatch, H hidden, N local heads, S positions of the cache, W numbers of an entry. Input and
output are token-sharded ``[T / tp, H]``; heads are cut over the tensor-parallel group.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from r1mega.config import ModelConfig
from r1mega.kernels.attention import attention_over_cache, causal_attention
from r1mega.kernels.parameter import local
from r1mega.kernels.rotate import rotate
from r1mega.model.cache import DecodeStep, PromptStep
from r1mega.model.rope import RotaryTable, softmax_scale
from r1mega.model.sequences import Sequences
from r1mega.parallel_state import ParallelState
from r1mega.tensor_parallel.collectives import gather_tokens, reduce_scatter_tokens
from r1mega.tensor_parallel.layers import Linear, RMSNorm, apply_all

# DeepSeek's code has this constant, whatever rms_norm_eps says of the other norms (Moonlight: 1e-5).
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """MLA: queries, keys and values are projected up from low-rank latents.

    The latents are computed on each rank's own tokens and only they are gathered: ``q_lora + kv_lora + rope``
    numbers a token instead of H.
    """

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        a, self.layer = config.attention, layer
        self.group = state.group("tp")
        self.heads = a.num_heads // state.size("tp")
        self.kv_rank, self.nope_dim, self.rope_dim, self.v_dim = (
            a.kv_lora_rank, a.qk_nope_head_dim, a.qk_rope_head_dim, a.v_head_dim,
        )  # fmt: skip
        self.scale = softmax_scale(a.rope, self.nope_dim + self.rope_dim)
        linear = partial(Linear, state=state, dtype=dtype, device=device)
        norm = partial(RMSNorm, eps=LATENT_NORM_EPS, dtype=dtype, device=device)
        q_width = a.num_heads * (self.nope_dim + self.rope_dim)
        self.has_q_lora = a.q_lora_rank is not None
        if a.q_lora_rank is None:
            self.q_proj = linear(config.hidden_size, q_width, cut="column")
        else:
            self.q_a_proj = linear(config.hidden_size, a.q_lora_rank, cut=None)
            self.q_a_layernorm = norm(a.q_lora_rank)
            self.q_b_proj = linear(a.q_lora_rank, q_width, cut="column")
        self.kv_a_proj_with_mqa = linear(config.hidden_size, self.kv_rank + self.rope_dim, cut=None)
        self.kv_a_layernorm = norm(self.kv_rank)
        self.kv_b_proj = linear(self.kv_rank, a.num_heads * (self.nope_dim + self.v_dim), cut="column")
        self.o_proj = linear(a.num_heads * self.v_dim, config.hidden_size, cut="row")
        self.rotary = RotaryTable(a.rope, self.rope_dim)

    def forward(self, hidden_TH: Tensor, sequences: Sequences) -> Tensor:
        """``[T / tp, H] -> [T / tp, H]``."""
        length = sequences.length
        query, latent, key_rope = self._project(hidden_TH)
        if isinstance(sequences.cache, DecodeStep):
            return self._decode(query, latent, key_rope, sequences.cache)
        cos, sin = self.rotary(length, hidden_TH.dtype, hidden_TH.device, sequences.packed)
        query_nope, query_rope = query.unflatten(0, (-1, length)).split([self.nope_dim, self.rope_dim], dim=-1)
        query = torch.cat([query_nope, rotate(query_rope, cos, sin, interleaved=True)], dim=-1)
        key_value = self.kv_b_proj(latent).view(-1, length, self.heads, self.nope_dim + self.v_dim)
        key_nope, value = key_value.split([self.nope_dim, self.v_dim], dim=-1)
        key_rope = rotate(key_rope.reshape(-1, length, 1, self.rope_dim), cos, sin, interleaved=True)
        key = torch.cat([key_nope, key_rope.expand(-1, -1, self.heads, -1)], dim=-1)
        if isinstance(sequences.cache, PromptStep):
            latent_entry = latent, key_rope.view(-1, self.rope_dim)
            entry = (
                latent_entry
                if sequences.cache.absorbs
                else (key.flatten(0, 1).flatten(1), value.flatten(2).flatten(0, 1))
            )
            sequences.cache.keep(self.layer, torch.cat(entry, dim=-1))
        out = _attend(query, key, value, self.scale, sequences.packed)
        return reduce_scatter_tokens(self.o_proj(out), self.group)

    def entry_width(self, absorbs: bool) -> int:
        """Numbers that the cache keeps of a token: the latent and the rotated key; or keys and values of the heads."""
        if absorbs:
            return self.kv_rank + self.rope_dim
        return self.heads * (self.nope_dim + self.rope_dim + self.v_dim)

    def _project(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all ranks' tokens: queries ``[T, N, nope + rope]``, normed latents and the keys that are to be rotated."""
        if self.has_q_lora:
            query, latent = apply_all((self.q_a_proj, self.kv_a_proj_with_mqa), hidden_TH)
            query = self.q_b_proj(gather_tokens(self.q_a_layernorm(query), self.group))
        else:
            latent = self.kv_a_proj_with_mqa(hidden_TH)
            query = self.q_proj(gather_tokens(hidden_TH, self.group))
        latent, key_rope = latent.split([self.kv_rank, self.rope_dim], dim=-1)
        latent = gather_tokens(torch.cat([self.kv_a_layernorm(latent), key_rope], dim=-1), self.group)
        latent, key_rope = latent.split([self.kv_rank, self.rope_dim], dim=-1)
        return query.view(-1, self.heads, self.nope_dim + self.rope_dim), latent, key_rope

    def _decode(self, query: Tensor, latent: Tensor, key_rope: Tensor, cache: DecodeStep) -> Tensor:
        """One token a row."""
        cos, sin = cache.rotation(self.rotary, query.dtype)
        query_nope, query_rope = query.split([self.nope_dim, self.rope_dim], dim=-1)
        query_rope, key_rope = (
            rotate(part.unsqueeze(0), cos, sin, interleaved=True)[0] for part in (query_rope, key_rope.unsqueeze(1))
        )
        attend = self._attend_to_latents if cache.absorbs else self._attend_to_keys
        return reduce_scatter_tokens(self.o_proj(attend(query_nope, query_rope, latent, key_rope, cache)), self.group)

    def _attend_to_latents(
        self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, cache: DecodeStep
    ) -> Tensor:
        """All heads attend to the entries as they are (DeepSeek-V2, section 2.1.2).

        Instead of keys and values of every old token, the queries are brought to the latent space by the key half of
        ``kv_b_proj``, and the sums of latents from there by its value half.
        """
        entries = cache.add(self.layer, torch.cat([latent, key_rope.squeeze(1)], dim=-1))
        weight = local(self.kv_b_proj.weight).view(self.heads, self.nope_dim + self.v_dim, self.kv_rank)
        to_latent, to_value = weight.split([self.nope_dim, self.v_dim], dim=1)
        query_latent = torch.bmm(query_nope.transpose(0, 1), to_latent).transpose(0, 1)
        query = torch.cat([query_latent, query_rope], dim=-1).unsqueeze(1)
        entries = entries.unsqueeze(1)
        out = attention_over_cache(query, entries, entries[..., : self.kv_rank], cache.mask, self.scale, cache.scratch)
        return torch.bmm(out.squeeze(1).transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1).flatten(1)

    def _attend_to_keys(
        self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, key_rope: Tensor, cache: DecodeStep
    ) -> Tensor:
        """Every head attends to its own keys, with the products that training makes, which round as they do there."""
        new = self.kv_b_proj(latent).unflatten(1, (self.heads, -1))
        key_nope, value = new.split([self.nope_dim, self.v_dim], dim=-1)
        key = torch.cat([key_nope, key_rope.expand(-1, self.heads, -1)], dim=-1)
        entries = cache.add(self.layer, torch.cat([key.flatten(1), value.flatten(1)], dim=-1))
        keys, values = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in entries.split([self.heads * (self.nope_dim + self.rope_dim), self.heads * self.v_dim], dim=2)
        )
        query = torch.cat([query_nope, query_rope], dim=-1).unsqueeze(2)
        return attention_over_cache(query, keys, values, cache.mask, self.scale, cache.scratch).flatten(1)


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention with optional QKV bias (Qwen2) and QK norm (Qwen3)."""

    def __init__(self, config: ModelConfig, layer: int, state: ParallelState, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        a, self.layer = config.attention, layer
        self.group = state.group("tp")
        self.head_dim, self.kv_heads = config.head_dim, a.kv_heads // state.size("tp")
        self.scale = softmax_scale(a.rope, self.head_dim)
        linear = partial(Linear, state=state, dtype=dtype, device=device)
        norm = partial(RMSNorm, self.head_dim, config.norm_eps, dtype, device)
        q_width, kv_width = a.num_heads * self.head_dim, a.kv_heads * self.head_dim
        self.q_proj = linear(config.hidden_size, q_width, cut="column", bias=a.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_width, cut="column", bias=a.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_width, cut="column", bias=a.qkv_bias)
        self.o_proj = linear(q_width, config.hidden_size, cut="row")
        self.q_norm = norm() if a.qk_norm else nn.Identity()
        self.k_norm = norm() if a.qk_norm else nn.Identity()
        self.rotary = RotaryTable(a.rope, self.head_dim)

    def forward(self, hidden_TH: Tensor, sequences: Sequences) -> Tensor:
        """``[T / tp, H] -> [T / tp, H]``."""
        cache = sequences.cache
        decodes = isinstance(cache, DecodeStep)
        hidden_TH = gather_tokens(hidden_TH, self.group)
        query, key, value = (
            projected.unflatten(1, (-1, self.head_dim)).unflatten(0, (1, -1) if decodes else (-1, sequences.length))
            for projected in apply_all((self.q_proj, self.k_proj, self.v_proj), hidden_TH)
        )
        if isinstance(cache, DecodeStep):
            cos, sin = cache.rotation(self.rotary, hidden_TH.dtype)
        else:
            cos, sin = self.rotary(sequences.length, hidden_TH.dtype, hidden_TH.device, sequences.packed)
        query = rotate(self.q_norm(query), cos, sin, interleaved=False)
        key = rotate(self.k_norm(key), cos, sin, interleaved=False)
        if isinstance(cache, DecodeStep):
            return self._decode(query[0], key[0], value[0], cache)
        if isinstance(cache, PromptStep):
            cache.keep(self.layer, torch.cat([key, value], dim=2).flatten(0, 1).flatten(1))
        out = _attend(query, key, value, self.scale, sequences.packed)
        return reduce_scatter_tokens(self.o_proj(out), self.group)

    def entry_width(self, absorbs: bool) -> int:
        """Numbers that the cache keeps of a token: keys and values of this rank's heads."""
        return 2 * self.kv_heads * self.head_dim

    def _decode(self, query: Tensor, key: Tensor, value: Tensor, cache: DecodeStep) -> Tensor:
        """One token a row; the queries of a key's heads stand together, ``[T, kv_heads, N / kv_heads, head_dim]``."""
        entries = cache.add(self.layer, torch.cat([key, value], dim=1).flatten(1))
        keys, values = entries.unflatten(2, (2, self.kv_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        query = query.unflatten(1, (self.kv_heads, -1))
        out = attention_over_cache(query, keys, values, cache.mask, self.scale, cache.scratch)
        return reduce_scatter_tokens(self.o_proj(out.flatten(1)), self.group)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, packed: list[int] | None) -> Tensor:
    """``[batch, length, N, dim]`` each, to ``[T, N * v_dim]``."""
    out = causal_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale, packed)
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def build_attention(
    config: ModelConfig, layer: int, state: ParallelState, dtype: torch.dtype, device: str
) -> LatentAttention | GroupedQueryAttention:
    """The attention of the decoder layer with the global index ``layer``."""
    if config.attention.kind == "mla":
        return LatentAttention(config, layer, state, dtype, device)
    return GroupedQueryAttention(config, layer, state, dtype, device)
