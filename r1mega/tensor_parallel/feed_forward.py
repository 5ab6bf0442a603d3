"""The dense feed-forward: SwiGLU (arXiv 2002.05202), cut over the tensor-parallel group."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r1mega.kernels.swiglu import swiglu
from r1mega.parallel_state import ParallelState
from r1mega.tensor_parallel.collectives import gather_tokens, reduce_scatter_tokens
from r1mega.tensor_parallel.layers import Linear, apply_all


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``. Token-sharded in and out: ``[T / tp, H] -> [T / tp, H]``."""

    def __init__(self, hidden_size: int, width: int, state: ParallelState, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.group = state.group("tp")
        self.gate_proj = Linear(hidden_size, width, state, "column", dtype=dtype, device=device)
        self.up_proj = Linear(hidden_size, width, state, "column", dtype=dtype, device=device)
        self.down_proj = Linear(width, hidden_size, state, "row", dtype=dtype, device=device)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        hidden_TH = gather_tokens(hidden_TH, self.group)
        gate_TF, up_TF = apply_all((self.gate_proj, self.up_proj), hidden_TH)
        return reduce_scatter_tokens(self.down_proj(swiglu(gate_TF, up_TF)), self.group)
