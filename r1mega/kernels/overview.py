"""What ``r1mega kernels`` prints: each operation, its implementations, and which ones run on this machine.

An implementation that has no line here does not exist. Which tensors the kernels take is said once, in
:data:`CONDITIONS`, since it is the same for all operations. Implementations are tried in the order in which they stand.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from r1mega.kernels import cuda, native, triton
from r1mega.kernels.products import native_multiplies

CPP, CUDA, TRITON, PYTORCH = "C++", "CUDA", "Triton", "PyTorch"
CONDITIONS = (
    "C++ kernels take float32 and float64 tensors on the CPU; products are made by one with AVX-512 where PyTorch's\n"
    "library (MKL) has none, on all but Intel's processors. CUDA kernels take tensors on the GPU: route float32, up\n"
    "to 384 experts, 16 choices and 32 groups; permute all types. Triton kernels take float32, float16 and bfloat16\n"
    "tensors on the GPU. For all others an operation runs PyTorch's."
)


@dataclass(frozen=True)
class Operation:
    """One operation: its functions, where they are, and its implementations, the one that is preferred first."""

    name: str
    module: str
    does: str
    implementations: tuple[str, ...] = (CPP, PYTORCH)


OPERATIONS = (
    Operation("route", "route", "scores, group-limited choice, weights, ranks, counts", (CPP, CUDA, TRITON, PYTORCH)),
    Operation("rank_choices", "route", "ranks and counts of choices made elsewhere", (CPP, CUDA, PYTORCH)),
    Operation("permute", "permute", "token rows to expert order", (CPP, CUDA, TRITON, PYTORCH)),
    Operation("combine", "combine", "the sum of each token's rows", (CPP, TRITON, PYTORCH)),
    Operation("swiglu", "swiglu", "silu(gate) * up", (CPP, TRITON, PYTORCH)),
    Operation("weighted_swiglu", "swiglu", "silu(gate) * up * the router's weight", (CPP, TRITON, PYTORCH)),
    Operation("grouped_swiglu", "grouped_swiglu", "a grouped_linear and its weighted_swiglu", (TRITON, PYTORCH)),
    Operation("rms_norm", "rms_norm", "root-mean-square normalisation", (CPP, TRITON, PYTORCH)),
    Operation("rotate", "rotate", "rotary position embedding"),
    Operation("linear", "linear", "products with one or several weights"),
    Operation("grouped_linear", "linear", "products of each expert's rows with its weight", (CPP, TRITON, PYTORCH)),
    Operation("policy_head", "policy_head", "policy loss from hidden states", (CPP, TRITON, PYTORCH)),
    Operation("policy_log_probs", "policy_head", "log-probabilities and entropy", (CPP, TRITON, PYTORCH)),
    Operation("causal_attention", "attention", "softmax attention", (PYTORCH,)),
)


def running(operation: Operation) -> str:
    """The implementation that runs on the CPU for tensors that it takes."""
    multiplies = operation.module != "linear" or native_multiplies()
    here = {CPP: native.library is not None and multiplies, PYTORCH: True}
    return next(name for name in operation.implementations if here.get(name))


def running_on_gpu(operation: Operation) -> str | None:
    """The implementation that runs on the GPU for tensors that it takes; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    here = {CUDA: cuda.library is not None, TRITON: triton.available(), PYTORCH: True}
    return next(name for name in operation.implementations if here.get(name))


def as_dict() -> dict:
    """The table for ``--json``."""
    return {
        "cpp": {"available": native.library is not None, "reason": native.reason},
        "cuda": {"available": cuda.library is not None, "reason": cuda.reason},
        "triton": {"available": triton.available(), "reason": triton.reason()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "operations": [
            {**asdict(operation), "running": running(operation), "running_on_gpu": running_on_gpu(operation)}
            for operation in OPERATIONS
        ],
    }


def as_text() -> str:
    """The table for people."""
    lines = [f"{'operation':18}{'on CPU':9}{'on GPU':9}{'implementations':28}what it does"]
    for operation in OPERATIONS:
        implementations = ", ".join(operation.implementations)
        on_cpu, on_gpu = running(operation), running_on_gpu(operation) or "-"
        lines.append(f"{operation.name:18}{on_cpu:9}{on_gpu:9}{implementations:28}{operation.does}")
    gpu = "" if torch.cuda.is_available() else "; PyTorch finds no GPU here"
    why = [f"Why: {native.reason}.", f"     {cuda.reason}{gpu}.", f"     {triton.reason()}."]
    return "\n".join([*lines, "", *why, CONDITIONS])
