"""What an operation is given: shapes, types and devices, before a kernel that checks nothing gets the addresses.

Numbers are looked at by no function here: on a GPU that would wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shaped(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raises ValueError unless the tensor has this shape and lies there."""
    if tensor.shape != tuple(shape) or tensor.device != device:
        wanted, found = _described(shape, device), _described(tensor.shape, tensor.device)
        raise ValueError(f"{name}: must be of {wanted}, not of {found}")


def matrix(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor has two dimensions."""
    if tensor.dim() != 2:
        raise ValueError(f"{name}: must have 2 dimensions, not {tensor.dim()}")


def vector(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor has one dimension."""
    if tensor.dim() != 1:
        raise ValueError(f"{name}: must have 1 dimension, not {tensor.dim()}")


def floating(name: str, tensor: Tensor) -> None:
    """Raises ValueError for integers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: must be of a floating-point type, not {tensor.dtype}")


def integers(
    name: str, tensor: Tensor, shape: Sequence[int] | None = None, device: torch.device | None = None
) -> Tensor:
    """The tensor as int64, which the kernels read; other routers give int32. Raises ValueError for no integers."""
    if tensor.dtype not in INTEGERS:
        raise ValueError(f"{name}: must be integers, int64 or narrower, not {tensor.dtype}")
    if shape is not None:
        shaped(name, tensor, shape, tensor.device if device is None else device)
    return tensor.to(torch.int64)


def _described(shape: Sequence[int], device: torch.device) -> str:
    return f"shape {list(shape)} on {device}"
