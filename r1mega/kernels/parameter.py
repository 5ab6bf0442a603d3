"""Parameters as operations see them: a local shard, whose gradient is handed to autograd or to a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class WeightGradients(Protocol):
    """What a layer needs of a weight-gradient store (``r1mega.pipeline.weight_gradient``)."""

    def add(self, work: Callable[[], None]) -> None: ...


def local(tensor: Tensor) -> Tensor:
    """The shard of a ``DTensor`` that this rank holds; any other tensor as it is. Not differentiable."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like_parameter(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` of the local shard, as a ``DTensor`` where ``parameter`` is one."""
    if not isinstance(parameter, DTensor):
        return gradient
    return DTensor.from_local(
        gradient, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


def gradient_buffer(parameter: Tensor) -> Tensor:
    """The local shard of ``parameter.grad``, made of zeros where there is none yet."""
    if parameter.grad is None:
        parameter.grad = like_parameter(torch.zeros_like(local(parameter)), parameter)
    return local(parameter.grad)
