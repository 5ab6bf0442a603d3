"""What ``r1mega kernels`` prints: each operation, its implementations, and which ones run on this machine.

An implementation that has no line here does not exist. Which tensors the kernels take is said once, in
:data:`CONDITIONS`, since it is the same for all operations. Implementations are tried in the order in which they stand.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from r1mega.kernels import cuda, native

CPP, CUDA, PYTORCH = "C++", "CUDA", "PyTorch"
CONDITIONS = (
    "C++ kernels take float32 and float64 tensors on the CPU. CUDA kernels take tensors on the GPU: route float32, up\n"
    "to 384 experts, 16 choices and 32 groups; permute all types. For all others an operation runs PyTorch's."
)


@dataclass(frozen=True)
class Operation:
    """One operation: its functions, where they are, and its implementations, the one that is preferred first."""

    name: str
    module: str
    does: str
    implementations: tuple[str, ...] = (CPP, PYTORCH)


OPERATIONS = (
    Operation(
        "route",
        "route",
        "scores, group-limited choice, weights, ranks, counts, and their gradient",
        (CPP, CUDA, PYTORCH),
    ),
    Operation("rank_choices", "route", "ranks and counts of choices made elsewhere"),
    Operation("permute", "permute", "token rows to expert order", (CPP, CUDA, PYTORCH)),
    Operation("combine", "permute", "the sum of each token's rows"),
    Operation("swiglu", "swiglu", "silu(gate) * up"),
    Operation("weighted_swiglu", "swiglu", "silu(gate) * up * the router's weight"),
    Operation("rms_norm", "rms_norm", "root-mean-square normalisation"),
    Operation("linear", "linear", "products with one or several weights", (PYTORCH,)),
    Operation("grouped_linear", "linear", "products of each expert's rows with its weight", (PYTORCH,)),
    Operation("causal_attention", "attention", "softmax attention", (PYTORCH,)),
)


def running(operation: Operation) -> str:
    """The implementation that runs on the CPU for tensors that it takes."""
    here = {CPP: native.library is not None, PYTORCH: True}
    return next(name for name in operation.implementations if here.get(name))


def running_on_gpu(operation: Operation) -> str | None:
    """The implementation that runs on the GPU for tensors that it takes; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    here = {CUDA: cuda.library is not None, PYTORCH: True}
    return next(name for name in operation.implementations if here.get(name))


def as_dict() -> dict:
    """The table for ``--json``."""
    return {
        "cpp": {"available": native.library is not None, "reason": native.reason},
        "cuda": {"available": cuda.library is not None, "reason": cuda.reason},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "operations": [
            {**asdict(operation), "running": running(operation), "running_on_gpu": running_on_gpu(operation)}
            for operation in OPERATIONS
        ],
    }


def as_text() -> str:
    """The table for people."""
    lines = [f"{'operation':18}{'on CPU':9}{'on GPU':9}{'implementations':21}what it does"]
    for operation in OPERATIONS:
        implementations = ", ".join(operation.implementations)
        on_cpu, on_gpu = running(operation), running_on_gpu(operation) or "-"
        lines.append(f"{operation.name:18}{on_cpu:9}{on_gpu:9}{implementations:21}{operation.does}")
    gpu = "" if torch.cuda.is_available() else "; PyTorch finds no GPU here"
    return "\n".join([*lines, "", f"Why: {native.reason}.", f"     {cuda.reason}{gpu}.", CONDITIONS])
