"""The C++ kernels of ``csrc/`` (module ``r1mega._C``): whether they are here, and which tensors they take.

They run where the extension was built, ``R1MEGA_NATIVE`` is not 0, and all tensors of a call are plain, on the CPU and
of one type, float32 or float64. Everything else runs the PyTorch reference in the operation's file, which is also its
specification. Neither choice needs a setting, and results do not depend on the number of threads.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

INTERFACE = 9  # the extension's functions and their arguments; bind.cpp has the same number
SUFFIXES = {torch.float32: "_float32", torch.float64: "_float64"}
PLAIN = (Tensor, torch.nn.Parameter)
# From this size on, copied rows go past the cache: they would push out what is needed sooner.
STREAMED_BYTES = 1 << 23
ALIGNMENT = 16
# From this size on, results are made in memory that is used again (csrc/buffers.h).
REUSED_BYTES = 1 << 23


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    if os.environ.get("R1MEGA_NATIVE") == "0":
        return None, "R1MEGA_NATIVE=0 is set"
    try:
        module = importlib.import_module("r1mega._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "r1mega._C"
        reason = "not built (it needs a C++17 compiler and pybind11)" if missing else f"does not load ({error})"
        return None, f"the C++ extension is {reason}; make setup builds it, as does pip install --no-build-isolation"
    if getattr(module, "INTERFACE", None) != INTERFACE:
        return None, "the C++ extension was built from other sources; make setup builds it again"
    return module, f"the C++ extension is built and uses {module.level()} code on this machine"


library, reason = _load()


def takes(*tensors: Tensor | None) -> bool:
    """Whether the C++ kernels run for these floating-point tensors; None stands for one that is left out."""
    if library is None:
        return False
    dtype = None
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) not in PLAIN or not tensor.is_cpu or (dtype is not None and tensor.dtype != dtype):
                return False
            dtype = tensor.dtype
    return dtype in SUFFIXES


def takes_integers(*tensors: Tensor) -> bool:
    """Whether the C++ kernels run for these: plain, on the CPU, int64, dense."""
    return library is not None and all(
        type(tensor) in PLAIN and tensor.is_cpu and tensor.dtype == torch.int64 and tensor.is_contiguous()
        for tensor in tensors
    )


def call(name: str, tensor: Tensor | None, *arguments: object) -> None:
    """Call the function ``name`` for ``tensor``'s type; tensors become pointers, None the null pointer.

    The caller has checked shapes and strides: the kernels check nothing but what would lead outside of an array.
    """
    function = getattr(library, name if tensor is None else name + SUFFIXES[tensor.dtype])
    function(*map(_pointer, arguments), torch.get_num_threads())


def _pointer(argument: object) -> object:
    if type(argument) in PLAIN:
        return argument.data_ptr()  # type: ignore[attr-defined]
    return 0 if argument is None else argument


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A new tensor of the type and device of ``like``; a large one's memory is used again when nothing refers to it."""
    num_bytes = math.prod(shape) * like.element_size()
    if library is None or type(like) not in PLAIN or num_bytes < REUSED_BYTES:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return torch.frombuffer(library.Buffer(num_bytes), dtype=like.dtype).view(shape)


def streams(out: Tensor, row_bytes: int) -> bool:
    """Whether rows copied to ``out`` go past the cache."""
    return out.nbytes >= STREAMED_BYTES and row_bytes % ALIGNMENT == 0 and out.data_ptr() % ALIGNMENT == 0


def row_stride(input: Tensor) -> int | None:
    """Elements from one row of the last dimension to the next; None where there is no such number."""
    if input.is_contiguous():
        return input.shape[-1]
    return input.stride(0) if input.dim() == 2 and input.stride(1) == 1 else None
