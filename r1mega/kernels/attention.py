"""Attention: causal over whole sequences, and of new tokens over what a cache holds of the old ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1mega.kernels.scratch import Scratch


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, packed: list[int] | None = None
) -> Tensor:
    """Causal softmax attention; the backend (flash, cuDNN, plain) is PyTorch's choice.

    Args:
        query: ``[batch, heads, length, qk_dim]``.
        key: ``[batch, kv_heads, length, qk_dim]``; ``kv_heads`` divides ``heads``.
        value: ``[batch, kv_heads, length, v_dim]``.
        scale: factor of the scores.
        packed: lengths of the sequences that stand one behind the other, in sum ``length``; a token sees its own only.

    Returns:
        ``[batch, heads, length, v_dim]``.
    """
    if packed is not None:
        parts = zip(*(tensor.split(packed, dim=2) for tensor in (query, key, value)), strict=True)
        return torch.cat([causal_attention(q, k, v, scale) for q, k, v in parts], dim=2)
    grouped = key.shape[1] != query.shape[1]
    v_dim = value.shape[-1]
    value = _as_wide(value, query)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[..., :v_dim]


def attention_over_cache(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, scratch: Scratch
) -> Tensor:
    """Attention of one new token a row to the tokens that its row has in a cache.

    Args:
        query: ``[rows, kv_heads, queries, qk_dim]``, the queries that share a key's head.
        key: ``[rows, kv_heads, length, qk_dim]``.
        value: ``[rows, kv_heads, length, v_dim]``.
        mask: ``[rows, length]``, added to the scores.
        scale: factor of the scores.
        scratch: holds the scores.

    Returns:
        ``[rows, kv_heads, queries, v_dim]``.
    """
    # Of one head on a CPU, two products take half the time of the flash kernel (256 rows, length 80, width 48). In a
    # narrower type they would round the scores.
    if key.shape[1] == 1 and query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        scores = scratch.empty("scores", (*query.shape[:2], key.shape[1]), query.dtype, query.device)
        torch.bmm(query * scale, key.transpose(1, 2), out=scores).add_(mask.unsqueeze(1))
        return torch.bmm(torch.softmax(scores, dim=-1, out=scores), value).unsqueeze(1)
    v_dim = value.shape[-1]
    value = _as_wide(value, query)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None], scale=scale)[..., :v_dim]


def _as_wide(value: Tensor, query: Tensor) -> Tensor:
    """The CPU's flash kernel wants value heads as wide as query heads; without it the scores are kept for backward."""
    missing = query.shape[-1] - value.shape[-1]
    return F.pad(value, (0, missing)) if query.device.type == "cpu" and missing > 0 else value
