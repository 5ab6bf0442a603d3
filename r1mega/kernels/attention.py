"""Causal attention through PyTorch's ``scaled_dot_product_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    # The CPU's flash kernel wants value heads as wide as query heads; without it the scores are kept for backward.
    if query.device.type == "cpu" and v_dim < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - v_dim))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[..., :v_dim]
