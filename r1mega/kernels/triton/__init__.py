"""Triton versions of the operations, for GPUs; here is whether they run, which tensors they take, and why not.

``combine``, ``swiglu``, ``rms_norm``, ``route`` (and its backward), ``scan``, ``permute``, ``grouped`` (products
of each expert's rows) and ``policy_head`` (two passes over logits) are plain functions on tensors that launch kernels
and know no autograd; ``compat`` is what their kernels share. Triton is imported with the first of these modules, never
with this package, so that a machine without it works as before.

They run for plain float32, float16 and bfloat16 tensors on one NVIDIA GPU of compute capability 8.0 or newer, unless
``R1MEGA_TRITON`` is 0. Under ``TRITON_INTERPRET=1``, Triton's own switch for debugging, they run on CPU tensors, and
slowly. No kernel is tuned while it runs: tile sizes are fixed, so that the same run gives the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

LIBRARY_CAPABILITIES = (9, 10)  # of GPUs for which PyTorch's ``grouped_mm`` has a bfloat16 kernel
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = (Tensor, torch.nn.Parameter)
LOWEST_CAPABILITY = (8, 0)


@functools.cache
def _found() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> bool:
    """Whether Triton kernels run on this machine at all."""
    return _hindrance() is None


def reason() -> str:
    """Why Triton kernels run here, or why not: a part of a sentence."""
    return _hindrance() or ("TRITON_INTERPRET=1 runs them on the CPU" if interpreting() else "Triton is installed")


def _hindrance() -> str | None:
    if os.environ.get("R1MEGA_TRITON") == "0":
        return "R1MEGA_TRITON=0 is set"
    if not _found():
        return "Triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "Triton kernels need an NVIDIA GPU"
    if not _capable(torch.cuda.current_device()):
        return f"Triton kernels need a GPU of compute capability {'.'.join(map(str, LOWEST_CAPABILITY))}"
    return None


@functools.cache
def _capable(device_index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device_index) >= LOWEST_CAPABILITY


def takes(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether the Triton kernels run for these tensors of ``dtypes``; None stands for one that is left out.

    A kernel's code cannot be traced, so ``torch.compile`` sees the PyTorch reference.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    if torch.compiler.is_compiling() or not (device.type == "cuda" or (device.type == "cpu" and interpreting())):
        return False
    plain = all(type(tensor) in PLAIN and tensor.dtype in dtypes and tensor.device == device for tensor in given)
    return plain and available() and (device.index is None or interpreting() or _capable(device.index))
