"""Tensors with a shape but no numbers: for them an operation returns tensors of the right shape, computing nothing."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on the ``meta`` device or was made under ``FakeTensorMode``."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def on_host(tensor: Tensor) -> bool:
    """Whether the host can read the numbers of ``tensor`` without waiting for a GPU."""
    return tensor.device.type == "cpu" and not is_fake(tensor)
