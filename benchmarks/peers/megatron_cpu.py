"""Lets megatron-core 0.16.1 run on a CPU over gloo, without Transformer Engine and Apex.

megatron-core asks for CUDA by name in a few dozen places even where nothing of it is needed: the device of a
buffer, a stream, a random generator. The stand-ins here answer those calls; no arithmetic of Megatron's is
replaced, except that the norm of plain PyTorch is allowed under sequence parallelism (see
:func:`_allow_norm_under_sequence_parallel`). They change PyTorch for the whole process, so a process that
trains with Megatron does nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


class _Stream:
    """A CUDA stream, and an event of one, where everything runs in order: there is one, and nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__


class _RandomStates:
    """Megatron's tracker of CUDA generators. Dropout is off and weights are filled afterwards, so nothing is drawn."""

    def fork(self, *_: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True


def _on_cpu(factory: Callable) -> Callable:
    """``factory`` with ``device="cuda"`` read as the CPU."""

    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return on_cpu


def _answer_cuda_calls() -> None:
    cuda, stream = torch.cuda, _Stream()
    cuda.current_device = lambda: CPU
    cuda.Stream = _Stream
    cuda.current_stream = lambda *_: stream
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.synchronize = lambda *_: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    Tensor.cuda = lambda self, *_, **__: self
    for name in ("zeros", "ones", "tensor"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _accept_split_sizes_as_tensors() -> None:
    """Megatron turns the split sizes of an all-to-all into lists only if they are CUDA tensors; gloo wants lists."""
    original = dist.all_to_all_single

    def all_to_all_single(
        output: Tensor, sent: Tensor, output_sizes: Any = None, input_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        names = ("output_split_sizes", "input_split_sizes")
        sizes = [kwargs.pop(name, given) for name, given in zip(names, (output_sizes, input_sizes), strict=True)]
        sizes = [size.tolist() if hasattr(size, "tolist") else size for size in sizes]
        return original(output, sent, *sizes, *args, **kwargs)

    dist.all_to_all_single = all_to_all_single


def _allow_norm_under_sequence_parallel() -> None:
    """Megatron's wrapper of torch's norm refuses sequence parallelism, which its MoE demands with tensor parallelism.

    The norm is pointwise in the tokens: all that it lacks is the mark by which Megatron sums the gradient over tp.
    """
    from megatron.core.transformer import torch_norm

    def make(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.RMSNorm:
        norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm

    torch_norm.WrappedTorchNorm.__new__ = make


def import_megatron_on_cpu() -> None:
    """Import megatron-core's training parts with the stand-ins in place; call it before anything else of megatron."""
    _answer_cuda_calls()
    _accept_split_sizes_as_tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("models.gpt.gpt_layer_specs", "models.gpt.gpt_model", "optimizer", "pipeline_parallel"):
            importlib.import_module(f"megatron.core.{name}")
        from megatron.core.transformer.moe import moe_utils

    for module in list(sys.modules.values()):
        if module.__name__.startswith("megatron.core") and hasattr(module, "get_cuda_rng_tracker"):
            module.get_cuda_rng_tracker = lambda *_, **__: _RandomStates()
    if not hasattr(moe_utils, "te_general_gemm"):  # left unbound by 0.16.1 where Transformer Engine is missing
        moe_utils.te_general_gemm = None
    _allow_norm_under_sequence_parallel()
