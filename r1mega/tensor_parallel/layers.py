"""Linear layers and the embedding, cut over the tensor-parallel group.

They neither gather nor scatter tokens themselves: a block gathers once for all its column layers and scatters once
after its row layer (``collectives``). Cut parameters are ``DTensor``s, which says to FSDP, checkpoints and the
gradient norm how they are cut; the arithmetic is on local shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from r1mega.kernels.linear import linear, linears
from r1mega.kernels.parameter import WeightGradients, gradient_buffer, like_parameter, local
from r1mega.kernels.rms_norm import rms_norm
from r1mega.parallel_state import ParallelState

INITIAL_STD = 0.02


def cut_parameter(
    shape: tuple[int, ...],
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Parameter:
    """A parameter of global ``shape``, cut over ``mesh``, every cut even; normal with standard deviation 0.02.

    Training overwrites it (``r1mega.model.init``), so that the layout does not show in the initial weights.
    """
    local_shape = list(shape)
    for placement, size in zip(placements, mesh.shape, strict=True):
        if isinstance(placement, Shard):
            assert local_shape[placement.dim] % size == 0, f"{shape} does not divide over {size} ranks"
            local_shape[placement.dim] //= size
    shard = INITIAL_STD * torch.randn(local_shape, dtype=dtype, device=device)
    stride = torch.empty(shape, device="meta").stride()
    return nn.Parameter(
        DTensor.from_local(shard, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    )


class Linear(nn.Module):
    """``x @ weight.T (+ bias)``; ``cut`` is the dimension that tensor parallelism cuts.

    Args:
        in_features: global width of the input.
        out_features: global width of the output.
        state: the process groups.
        cut: ``column`` cuts the outputs, ``row`` the inputs (the result is then a partial sum), None nothing.
        bias: add a bias; not with ``row``.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        state: ParallelState,
        cut: str | None,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        assert cut in ("column", "row", None) and not (bias and cut == "row")
        self.weight_gradients: WeightGradients | None = None
        shape = (out_features, in_features)
        if cut is None:
            self.weight = nn.Parameter(INITIAL_STD * torch.randn(shape, dtype=dtype, device=device))
        else:
            placement = Shard(0 if cut == "column" else 1)
            self.weight = cut_parameter(shape, state.mesh["tp"], [placement], dtype, device)
        self.bias: nn.Parameter | None = None
        if bias and cut == "column":
            self.bias = cut_parameter((out_features,), state.mesh["tp"], [Shard(0)], dtype, device)
            nn.init.zeros_(local(self.bias))
        elif bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device))

    def forward(self, input_TI: Tensor) -> Tensor:
        """``[T, in] -> [T, out]``, local widths."""
        return self.add_bias(linear(input_TI, self.weight, self.weight_gradients))

    def add_bias(self, output_TO: Tensor) -> Tensor:
        if self.bias is None:
            return output_TO
        return output_TO + (self.bias.to_local() if isinstance(self.bias, DTensor) else self.bias)


def apply_all(layers: Sequence[Linear], input_TI: Tensor) -> list[Tensor]:
    """Several layers on the same input: as one by one, but its gradient is summed inside the matrix products."""
    outputs = linears(input_TI, [layer.weight for layer in layers], layers[0].weight_gradients)
    return [layer.add_bias(output) for layer, output in zip(layers, outputs, strict=True)]


class Embedding(nn.Module):
    """The token embedding, its rows (the vocabulary) cut over the tensor-parallel group."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        state: ParallelState,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.weight_gradients: WeightGradients | None = None
        self.first_row = state.rank_in("tp") * (vocab_size // state.size("tp"))
        self.weight = cut_parameter((vocab_size, hidden_size), state.mesh["tp"], [Shard(0)], dtype, device)

    def forward(self, ids_T: Tensor) -> Tensor:
        """``[T] int64 -> [T, H]``, a partial sum: ids of other ranks' rows give zeros."""
        return _Embed.apply(self.weight, ids_T, self.first_row, self.weight_gradients)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, first_row, store):
        table = local(weight)
        rows = ids - first_row
        elsewhere = None
        if table.shape[0] < weight.shape[0]:
            elsewhere = (rows < 0) | (rows >= table.shape[0])
            rows = rows.masked_fill(elsewhere, 0)
        ctx.weight, ctx.rows, ctx.elsewhere, ctx.store = weight, rows, elsewhere, store
        output = table.index_select(0, rows)
        return output if elsewhere is None else output.masked_fill_(elsewhere.unsqueeze(1), 0)

    @staticmethod
    def backward(ctx, grad_TH):
        weight, rows, elsewhere, store = ctx.weight, ctx.rows, ctx.elsewhere, ctx.store
        if elsewhere is not None:
            grad_TH = grad_TH.masked_fill(elsewhere.unsqueeze(1), 0)
        if store is not None:
            store.add(lambda: gradient_buffer(weight).index_add_(0, rows, grad_TH))
            return None, None, None, None
        gradient = torch.zeros_like(local(weight)).index_add_(0, rows, grad_TH)
        return like_parameter(gradient, weight), None, None, None


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; its weight is whole on every rank."""

    def __init__(
        self, width: int, eps: float, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight_gradients: WeightGradients | None = None
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))

    def forward(self, input_TH: Tensor) -> Tensor:
        return rms_norm(input_TH, self.weight, self.eps, self.weight_gradients)
