"""Tensors with a shape but no numbers: for them an operation returns tensors of the right shape, computing nothing.

But where somebody records what is done to them, as ``torch.export`` does, a result that nothing computed would be in
the recorded program: there PyTorch's operations run, which can be recorded.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no numbers, and nothing records what is done to it."""
    return has_no_numbers(tensor) and get_proxy_mode() is None


def has_no_numbers(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on the ``meta`` device or was made under ``FakeTensorMode``."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def on_host(tensor: Tensor) -> bool:
    """Whether the host can read the numbers of ``tensor`` without waiting for a GPU."""
    return tensor.device.type == "cpu" and not has_no_numbers(tensor)
