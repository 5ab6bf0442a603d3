"""Initial weights that depend on the seed and the parameter's name alone, never on the layout.

Each matrix is drawn whole from a generator of its own, and a rank keeps its part; an expert is a matrix of its own, so
that a rank draws its experts only.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from r1mega.config import ModelConfig
from r1mega.kernels.parameter import local
from r1mega.moe.router import Router

DATA_AXES = ("dp", "edp")


def local_slices(parameter: Tensor, coordinates: Mapping[str, int] | None = None) -> tuple[slice, ...]:
    """Which part of the global tensor a rank's shard is.

    Model-parallel axes cut first (evenly); then FSDP cuts what is left over its data-parallel axis, the way
    ``torch.chunk`` does, so that the last ranks may hold less, or nothing.

    Args:
        parameter: a parameter after FSDP, or before it, or any plain tensor (which is whole).
        coordinates: where the rank stands on each axis (:meth:`r1mega.parallel_state.Layout.coordinates`); None is this
            rank.
    """
    ranges = [[0, size] for size in parameter.shape]
    if isinstance(parameter, DTensor):
        mesh, names = parameter.device_mesh, parameter.device_mesh.mesh_dim_names or ()
        if coordinates is None:
            coordinates = dict(zip(names, mesh.get_coordinate() or (), strict=True))
        axes = list(zip(names, mesh.shape, parameter.placements, strict=True))
        for name, size, placement in sorted(axes, key=lambda axis: axis[0] in DATA_AXES):
            if not isinstance(placement, (Shard, _StridedShard)):
                continue
            start, stop = ranges[placement.dim]
            index, step = coordinates[name], -(-(stop - start) // size)
            ranges[placement.dim] = [min(start + index * step, stop), min(start + (index + 1) * step, stop)]
    return tuple(slice(start, stop) for start, stop in ranges)


def local_matrices(slices: tuple[slice, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The matrices of a shard of more than two dimensions: index in the shard, index in the whole tensor.

    Args:
        slices: which part the shard is (:func:`local_slices`).
    """
    leading = [range(part.start, part.stop) for part in slices[:-2]]
    for index in itertools.product(*leading):
        yield tuple(i - part.start for i, part in zip(index, leading, strict=True)), index


def _draw(name: str, shape: torch.Size, std: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32) * std


@torch.no_grad()
def initialize(stage: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill the local shards of every parameter and buffer of a stage.

    Matrices are normal with ``config.init_std``, norms one, biases zero. Float32 numbers in any dtype, so that runs in
    different precisions start alike.
    """
    for name, parameter in stage.named_parameters():
        shard, slices = local(parameter), local_slices(parameter)
        if name.endswith(".bias"):
            shard.zero_()
        elif parameter.dim() == 1:
            shard.fill_(1.0)
        elif shard.numel():
            for here, index in local_matrices(slices):
                matrix_name = ".".join([name, *map(str, index)])
                matrix = _draw(matrix_name, parameter.shape[-2:], config.init_std, seed)
                shard[here].copy_(matrix[slices[-2:]])
    for module in stage.modules():
        if isinstance(module, Router):
            if module.e_score_correction_bias is not None:
                module.e_score_correction_bias.zero_()
            module.tokens_per_expert.zero_()
