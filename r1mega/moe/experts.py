"""The routed experts of one layer: grouped SwiGLU feed-forwards.

Shapes: R routed rows, H hidden, E local experts, F expert width of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import Shard

from r1mega.config import MoEConfig
from r1mega.kernels.fake import has_no_numbers
from r1mega.kernels.grouped_swiglu import grouped_swiglu
from r1mega.kernels.linear import Counts, grouped_linear
from r1mega.kernels.parameter import WeightGradients
from r1mega.kernels.swiglu import weighted_swiglu
from r1mega.parallel_state import ParallelState
from r1mega.tensor_parallel.layers import cut_parameter


class Experts(nn.Module):
    """``down(silu(gate(x)) * up(x) * weight)`` of each row's expert.

    Experts are cut over ``ep``; each expert's width over ``etp``, where the result is a partial sum.
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
        self.weight_gradients: WeightGradients | None = None
        experts, width = config.num_experts, config.ffn_hidden_size
        mesh = state.expert_mesh["ep", "etp"]
        cut = [Shard(0), Shard(2)]
        # gate and up in one tensor: one grouped product, not two
        self.gate_up_proj = cut_parameter((experts, 2, width, hidden_size), mesh, cut, dtype, device)
        self.down_proj = cut_parameter((experts, hidden_size, width), mesh, cut, dtype, device)

    def forward(
        self,
        rows_RH: Tensor,
        weights_R: Tensor,
        counts: Counts,
        rows_again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Run each row through its expert.

        Args:
            rows_RH: ``[R, H]``, sorted by local expert.
            weights_R: ``[R]``, the router's weight of each row.
            counts: rows of each local expert; on a GPU, a tensor will do.
            rows_again: makes ``rows_RH`` anew. With it, the backward computes the rows and the SwiGLU again: kept are
                gate and up ``[R, 2 F]`` and the weights, not the rows ``[R, H]`` and the SwiGLU's result ``[R, F]``.
                The price on a GPU is a pass over gate and up, which the fused kernel saves.

        Returns:
            ``[R, H]``.
        """
        store = self.weight_gradients
        if rows_again is None:
            hidden_RF = grouped_swiglu(rows_RH, self.gate_up_proj, weights_R, counts, store)
            return grouped_linear(hidden_RF, self.down_proj, counts, store)
        # Not the fused kernel: its SwiGLU sees gate and up before they are rounded, so a backward that starts from the
        # kept ones would get another result than the one that the forward went on with.
        with _made_again(rows_RH, rows_again):
            gate_up_RF = grouped_linear(rows_RH, self.gate_up_proj, counts, store)
        hidden_RF = weighted_swiglu(gate_up_RF, weights_R)
        gate_up, weights = gate_up_RF.detach(), weights_R.detach()
        with _made_again(hidden_RF, lambda: weighted_swiglu(gate_up, weights)):
            return grouped_linear(hidden_RF, self.down_proj, counts, store)


def _made_again(tensor: Tensor, make: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """While inside, autograd keeps ``make`` in place of ``tensor``, and calls it when the backward wants the tensor."""
    if has_no_numbers(tensor):  # it has no address, and needs no memory
        return nullcontext()
    address, shape = tensor.data_ptr(), tensor.shape

    def pack(saved: Tensor) -> object:
        return make if saved.data_ptr() == address and saved.shape == shape else saved

    return saved_tensors_hooks(pack, lambda kept: kept if isinstance(kept, Tensor) else kept())
