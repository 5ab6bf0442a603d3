"""What the kernels share: arithmetic that is right on a GPU as in Triton's interpreter, and sizes of blocks.

The interpreter multiplies the bits of bfloat16 numbers as if they were integers, and truncates where a GPU rounds to
the nearest; so kernels compute in float32, :func:`dot` widens there, and results are stored through :func:`cast`.
Shapes in the kernels' names: T tokens, K choices, E experts, H hidden, F expert width, R routed rows, N tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
UNKNOWN_CAPABILITY, UNKNOWN_SHARED_MEMORY = (8, 0), 166912  # where there is no GPU: those of an A100


@triton.jit
def dot(a, b, acc):
    """``a @ b + acc`` with a float32 ``acc``; float32 factors are not rounded to tensor-float."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Float32 to ``dtype``, to the nearest and of two to the even one."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def exp(x):
    """The exponential that PyTorch's kernels use, so that equal scores stay equal; Triton's own is less exact."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


def padded(size: int, smallest: int = 1) -> int:
    """The power of two that is at least ``size``, since a block's size is one."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def pieces(size: int, block: int) -> int:
    """Blocks that cover ``size``."""
    return -(-size // block)


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: int) -> None:
    """Start ``kernel`` on the device of its first argument, a tensor or a descriptor of one.

    Products and sums are fused. This is said, because Triton 3.9 warns that its default will change.
    """
    with torch.cuda.device_of(getattr(arguments[0], "base", arguments[0])):
        kernel[grid](*arguments, enable_fp_fusion=True, **options)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else UNKNOWN_CAPABILITY


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have."""
    if device.type != "cuda":
        return UNKNOWN_SHARED_MEMORY
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
