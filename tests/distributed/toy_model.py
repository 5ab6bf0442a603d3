"""A toy with the parameter layouts of the real model, for tests of sharding, gradients, optimizer and checkpoints.

It computes nothing of worth: weights and gradients are functions of a parameter's name alone, so that any layout can
be compared with the whole tensors.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from r1mega.parallel_state import Layout, ParallelState
from r1mega.train.sharding import named_shards, reduce_gradients, shard

VOCAB, HIDDEN, WIDTH, EXPERTS, LAYERS = 24, 12, 8, 4, 2


def whole_tensor(name: str, shape: tuple[int, ...], kind: str = "weight") -> Tensor:
    """The whole weight (or gradient) of a parameter: seeded by its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode()))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _cut(mesh: DeviceMesh, shape: tuple[int, ...], *dims: int) -> nn.Parameter:
    empty = torch.empty(shape, dtype=torch.float64)
    return nn.Parameter(distribute_tensor(empty, mesh, [Shard(dim) for dim in dims], src_data_rank=None))


class ToyExperts(nn.Module):
    def __init__(self, state: ParallelState, num_experts: int) -> None:
        super().__init__()
        mesh = state.expert_mesh["ep", "etp"]
        self.gate_proj = _cut(mesh, (num_experts, WIDTH, HIDDEN), 0, 1)
        self.down_proj = _cut(mesh, (num_experts, HIDDEN, WIDTH), 0, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


class ToyLayer(nn.Module):
    def __init__(self, state: ParallelState, num_experts: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(HIDDEN, dtype=torch.float64))
        self.router = nn.Parameter(torch.empty(num_experts, HIDDEN, dtype=torch.float64))
        self.column = _cut(state.mesh["tp"], (WIDTH, HIDDEN), 0)
        self.row = _cut(state.mesh["tp"], (HIDDEN, WIDTH), 1)
        self.experts = ToyExperts(state, num_experts)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x * 1.0)


class ToyStage(nn.Module):
    """The layers of one pipeline rank; ``embed_tokens.weight`` on the first, and on the last too when ``tied``."""

    def __init__(self, state: ParallelState, tied: bool = False, num_experts: int = EXPERTS) -> None:
        super().__init__()
        self.tied = tied
        rank, size = state.rank_in("pp"), state.size("pp")
        if rank == 0 or (tied and rank == size - 1):
            self.embed_tokens = nn.Module()
            self.embed_tokens.weight = _cut(state.mesh["tp"], (VOCAB, HIDDEN), 0)
        per_rank = LAYERS // size
        layers = range(rank * per_rank, (rank + 1) * per_rank)
        self.layers = nn.ModuleDict({str(i): ToyLayer(state, num_experts) for i in layers})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


@torch.no_grad()
def fill(parameters: list[tuple[str, DTensor]]) -> None:
    """Give every shard its part of the whole weight."""
    for name, parameter in parameters:
        parameter.to_local().copy_(local_part(whole_tensor(name, tuple(parameter.shape)), parameter))


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """The part of ``whole`` that this rank holds of ``like``."""
    shape, offset = compute_local_shape_and_global_offset(whole.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]


def build(layout: Layout, **settings: bool | int) -> tuple[ToyStage, list[tuple[str, DTensor]], ParallelState]:
    """A sharded stage with its weights, made the way the real one is: on the meta device first."""
    state = ParallelState(layout)
    with torch.device("meta"):
        stage = ToyStage(state, **settings)
    shard(stage, state, torch.float64)
    stage.to_empty(device="cpu")
    parameters = named_shards([stage])
    fill(parameters)
    return stage, parameters, state


def backward(stage: ToyStage, state: ParallelState) -> None:
    """Accumulate gradients by hand, whose sum over all ranks is ``whole_tensor(name, kind="gradient")``.

    Each data-parallel rank (and each tensor-parallel rank, for parameters that are whole there) adds a different part.
    """
    stage(torch.ones(1, HIDDEN, dtype=torch.float64))
    for name, parameter in stage.named_parameters():
        whole = whole_tensor(name, tuple(parameter.shape), "gradient")
        if isinstance(parameter, DTensor):
            expert = "experts" in name
            share = _share(state, ("edp",) if expert else ("dp",))
            gradient = DTensor.from_local(
                local_part(whole, parameter) * share, parameter.device_mesh, parameter.placements, run_check=False
            )
        else:
            gradient = whole * _share(state, ("dp", "tp"))
        if name == "embed_tokens.weight" and stage.tied:
            gradient = gradient * _share(state, ("pp",))
        parameter.grad = gradient
    reduce_gradients(stage)


def _share(state: ParallelState, names: tuple[str, ...]) -> float:
    """This rank's share; the shares of all ranks of the groups add up to 1."""
    share = 1.0
    for name in names:
        size = state.size(name)
        share *= (state.rank_in(name) + 1) / (size * (size + 1) / 2)
    return share
