"""What ``r1mega kernels`` prints: each operation, its implementations, and which one runs on this machine.

An implementation that has no line here does not exist. Which tensors the C++ kernels take is said once, in
:data:`CONDITION`, since it is the same for all of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from r1mega.kernels import native

CPP, PYTORCH = "C++", "PyTorch"
CONDITION = "C++ kernels take float32 and float64 tensors on the CPU; for all others an operation runs PyTorch's."


@dataclass(frozen=True)
class Operation:
    """One operation: its functions, where they are, and its implementations, the one that is preferred first."""

    name: str
    module: str
    does: str
    implementations: tuple[str, ...] = (CPP, PYTORCH)


OPERATIONS = (
    Operation("route", "route", "scores, group-limited choice, weights, ranks, counts, and their gradient"),
    Operation("rank_choices", "route", "ranks and counts of choices made elsewhere"),
    Operation("permute", "permute", "token rows to expert order"),
    Operation("combine", "combine", "the sum of each token's rows"),
    Operation("swiglu", "swiglu", "silu(gate) * up"),
    Operation("weighted_swiglu", "swiglu", "silu(gate) * up * the router's weight"),
    Operation("rms_norm", "rms_norm", "root-mean-square normalisation"),
    Operation("linear", "linear", "products with one or several weights", (PYTORCH,)),
    Operation("grouped_linear", "linear", "products of each expert's rows with its weight", (PYTORCH,)),
    Operation("causal_attention", "attention", "softmax attention", (PYTORCH,)),
)


def running(operation: Operation) -> str:
    """The implementation that runs here for tensors that it takes."""
    return next(name for name in operation.implementations if name != CPP or native.library is not None)


def as_dict() -> dict:
    """The table for ``--json``."""
    return {
        "cpp": {"available": native.library is not None, "reason": native.reason},
        "operations": [{**asdict(operation), "running": running(operation)} for operation in OPERATIONS],
    }


def as_text() -> str:
    """The table for people."""
    lines = [f"{'operation':18}{'runs here':11}{'implementations':17}what it does"]
    for operation in OPERATIONS:
        implementations = ", ".join(operation.implementations)
        lines.append(f"{operation.name:18}{running(operation):11}{implementations:17}{operation.does}")
    return "\n".join([*lines, "", f"Why: {native.reason}.", CONDITION])
