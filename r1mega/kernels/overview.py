"""What ``r1mega kernels`` prints: each operation, its implementations, which of them run on this machine, and why.

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
    "C++ kernels take float32 and float64 tensors on the CPU, and of indices int64. CUDA kernels take tensors on the\n"
    "GPU: route float32, up to 384 experts, 16 choices and 32 groups; permute all types. Triton kernels take float32,\n"
    "float16 and bfloat16 tensors on the GPU. For all others an operation runs PyTorch's."
)


@dataclass(frozen=True)
class Operation:
    """One operation: its functions, where they are, and its implementations, the one that is preferred first.

    Args:
        name: of the function.
        module: of ``r1mega.kernels``.
        does: what it does.
        implementations: all there are.
        on_cpu: why another one than the first that is here runs on the CPU, or which part of it does not.
        on_gpu: the same on a GPU.
        multiplies: whether it is a product of matrices, for which PyTorch's library may be better than a kernel.
    """

    name: str
    module: str
    does: str
    implementations: tuple[str, ...] = (CPP, PYTORCH)
    on_cpu: str = ""
    on_gpu: str = ""
    multiplies: bool = False


OPERATIONS = (
    Operation(
        "route", "route", "scores, group-limited choice, weights, ranks, counts", (CPP, CUDA, TRITON, PYTORCH),
        on_cpu="after PyTorch's sigmoid or softmax",
    ),
    Operation("rank_choices", "route", "ranks and counts of choices made elsewhere", (CPP, CUDA, PYTORCH)),
    Operation(
        "scan", "scan", "first rows from the counts of tiles of tokens", (CUDA, TRITON, PYTORCH),
        on_cpu="all tokens are one tile",
    ),
    Operation("permute", "permute", "token rows to expert order", (CPP, CUDA, TRITON, PYTORCH)),
    Operation("combine", "combine", "the sum of each token's rows, weighted or not", (CPP, TRITON, PYTORCH)),
    Operation("swiglu", "swiglu", "silu(gate) * up", (CPP, TRITON, PYTORCH)),
    Operation("weighted_swiglu", "swiglu", "silu(gate) * up * the router's weight", (CPP, TRITON, PYTORCH)),
    Operation(
        "grouped_swiglu", "grouped_swiglu", "a grouped_linear and its weighted_swiglu", (TRITON, PYTORCH),
        on_cpu="calls grouped_linear and weighted_swiglu",
    ),
    Operation("rms_norm", "rms_norm", "root-mean-square normalisation", (CPP, TRITON, PYTORCH)),
    Operation("rotate", "rotate", "rotary position embedding"),
    Operation(
        "linear", "linear", "products with one or several weights", on_gpu="its library multiplies", multiplies=True
    ),
    Operation(
        "grouped_linear", "linear", "products of each expert's rows with its weight", (CPP, TRITON, PYTORCH),
        on_gpu="PyTorch's grouped_mm would wait for the host", multiplies=True,
    ),
    Operation(
        "policy_head", "policy_head", "policy loss from hidden states", (CPP, TRITON, PYTORCH),
        on_cpu="the passes between the products, which are as linear's", on_gpu="the passes between PyTorch's products",
    ),
    Operation(
        "policy_log_probs", "policy_head", "log-probabilities and entropy", (CPP, TRITON, PYTORCH),
        on_cpu="the pass after a product, which is as linear's", on_gpu="the pass after PyTorch's product",
    ),
    Operation(
        "causal_attention", "attention", "softmax attention", (PYTORCH,),
        on_cpu="it chooses flash or plain", on_gpu="it chooses flash, cuDNN or plain",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Running:
    """What runs, and why: a part of a sentence."""

    name: str
    why: str


def running(operation: Operation) -> Running:
    """The implementation that runs on the CPU for tensors that it takes."""
    if CPP not in operation.implementations:
        return Running(PYTORCH, operation.on_cpu)
    if native.library is None:
        return Running(PYTORCH, "no C++ extension")
    if operation.multiplies and not native_multiplies():
        return Running(PYTORCH, "no C++ product is faster than its library's here")
    if operation.multiplies:
        return Running(CPP, "AVX-512, which PyTorch's library (MKL) uses on Intel's processors alone")
    return Running(CPP, operation.on_cpu or "the extension is built")


def running_on_gpu(operation: Operation) -> Running | None:
    """The implementation that runs on the GPU for tensors that it takes; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    missing: list[str] = []
    for name in operation.implementations:
        if name == CUDA and cuda.library is not None:
            return Running(CUDA, operation.on_gpu or "the library is built")
        if name == TRITON and triton.available():
            if operation.multiplies and _library_multiplies():
                return Running(PYTORCH, "grouped_mm has a bfloat16 kernel for this GPU; other types run Triton's")
            return Running(TRITON, operation.on_gpu or ("no CUDA library" if missing else "Triton is installed"))
        if name in (CUDA, TRITON):
            missing.append(name)
    if missing:
        return Running(PYTORCH, f"no {' and no '.join(missing)} kernels here")
    return Running(PYTORCH, operation.on_gpu or "there is no kernel for GPUs")


def _library_multiplies() -> bool:
    return torch.cuda.get_device_capability()[0] in triton.LIBRARY_CAPABILITIES


def as_dict() -> dict:
    """The table for ``--json``."""
    return {
        "cpp": {"available": native.library is not None, "reason": native.reason},
        "cuda": {"available": cuda.library is not None, "reason": cuda.reason},
        "triton": {"available": triton.available(), "reason": triton.reason()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "operations": [_operation_as_dict(operation) for operation in OPERATIONS],
    }


def _operation_as_dict(operation: Operation) -> dict:
    about = {name: asdict(operation)[name] for name in ("name", "module", "does", "implementations")}
    on_cpu, on_gpu = running(operation), running_on_gpu(operation)
    return about | {
        "running": on_cpu.name, "why": on_cpu.why,
        "running_on_gpu": on_gpu and on_gpu.name, "why_on_gpu": on_gpu and on_gpu.why,
    }  # fmt: skip


def as_text() -> str:
    """The tables for people."""
    lines = [f"{'operation':18}{'implementations':29}what it does"]
    lines += [f"{each.name:18}{', '.join(each.implementations):29}{each.does}" for each in OPERATIONS]
    lines += ["", *_runs("runs on the CPU", [running(operation) for operation in OPERATIONS])]
    if torch.cuda.is_available():
        lines += ["", *_runs("runs on the GPU", [running_on_gpu(operation) for operation in OPERATIONS])]
    gpu = "" if torch.cuda.is_available() else "; PyTorch finds no GPU here"
    why = [f"Why: {native.reason}.", f"     {cuda.reason}{gpu}.", f"     {triton.reason()}."]
    return "\n".join([*lines, "", *why, CONDITIONS])


def _runs(title: str, runs: list[Running | None]) -> list[str]:
    pairs = zip(OPERATIONS, runs, strict=True)
    rows = [f"{operation.name:18}{run.name:17}{run.why}" for operation, run in pairs if run is not None]
    return [f"{'operation':18}{title:17}why", *rows]
