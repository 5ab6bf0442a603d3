"""Matrix products of tensors that are at hand: no autograd, no parameters.

On a CPU that MKL, PyTorch's library, gives narrow vectors (all but Intel's), the C++ kernel multiplies float32 and
float64 in vectors of 64 bytes: 1.7 to 2.4 times MKL's speed on an AMD EPYC with AVX-512 (``benchmarks/products.py``).
oneDNN, which PyTorch has, too, comes close to that, but it compiles a kernel for each new number of rows and cannot add
to a matrix in place. Everywhere else PyTorch multiplies.

Shapes: M rows, N columns, K the depth; of groups R rows, E groups, X and Y features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r1mega.kernels import native

# With fewer rows the copy of the right matrix is most of the work, and with less work the call is.
FEWEST_ROWS, LEAST_WORK = 8, 1 << 18


def matmul(left_MK: Tensor, right_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """``left @ right``; into ``out`` where it is given."""
    if not _multiplies(left_MK, right_KN, out):
        return torch.mm(left_MK, right_KN, out=out)
    if out is None:
        out = native.empty((left_MK.shape[0], right_KN.shape[1]), left_MK)
    _one(out, left_MK, right_KN, add=False)
    return out


def add_matmul(total_MN: Tensor, left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """``total += left @ right`` inside the product; returns ``total``."""
    if not _multiplies(left_MK, right_KN, total_MN):
        return total_MN.addmm_(left_MK, right_KN)
    _one(total_MN, left_MK, right_KN, add=True)
    return total_MN


def group_matmul(rows_RX: Tensor, weights_EXY: Tensor, counts: Sequence[int]) -> Tensor:
    """``rows @ weights[e]`` for the ``counts[e]`` rows of each group; rows after the last group's are undefined.

    Args:
        rows_RX: ``[R, X]``, sorted by group.
        weights_EXY: ``[E, X, Y]``.
        counts: E numbers; they add up to R at most.

    Returns:
        ``[R, Y]``.
    """
    out = native.empty((rows_RX.shape[0], weights_EXY.shape[2]), rows_RX)
    if native_multiplies() and native.takes(rows_RX, weights_EXY) and _dense(weights_EXY):
        native.call(
            "products", rows_RX, rows_RX, *rows_RX.stride(), weights_EXY, *weights_EXY.stride(), out, 0, out.shape[1],
            list(counts), -1, out.shape[1], rows_RX.shape[1], False,
        )  # fmt: skip
        return out
    parts = zip(weights_EXY.unbind(), *_split(counts, rows_RX, out), strict=True)
    for weight_XY, rows_CX, out_CY in parts:
        torch.mm(rows_CX, weight_XY, out=out_CY)
    return out


def group_outer(left_RX: Tensor, right_RY: Tensor, counts: Sequence[int], out_EXY: Tensor, add: bool) -> None:
    """``out[e] = left.T @ right`` of the ``counts[e]`` rows of each group; with ``add``, added to ``out``."""
    in_rows = right_RY.stride(1) == 1 and out_EXY.stride(2) == 1
    if native_multiplies() and native.takes(left_RX, right_RY, out_EXY) and in_rows:
        by_group, by_row, _ = out_EXY.stride()
        native.call(
            "products", left_RX, left_RX, *reversed(left_RX.stride()), right_RY, 0, *right_RY.stride(), out_EXY,
            by_group, by_row, list(counts), left_RX.shape[1], right_RY.shape[1], -1, add,
        )  # fmt: skip
        return
    for out_XY, left_CX, right_CY in zip(out_EXY.unbind(), *_split(counts, left_RX, right_RY), strict=True):
        if add:
            out_XY.addmm_(left_CX.t(), right_CY)
        else:
            torch.mm(left_CX.t(), right_CY, out=out_XY)


def native_multiplies() -> bool:
    """Whether the C++ kernel is here, and faster than PyTorch's library."""
    return native.library is not None and native.library.multiplies()


def _multiplies(left_MK: Tensor, right_KN: Tensor, out: Tensor | None) -> bool:
    num_rows, depth = left_MK.shape
    return (
        num_rows >= FEWEST_ROWS
        and num_rows * depth * right_KN.shape[1] >= LEAST_WORK
        and native_multiplies()
        and native.takes(left_MK, right_KN, out)
        and _dense(right_KN)
        and (out is None or out.stride(1) == 1)
    )


def _dense(tensor: Tensor) -> bool:
    """Whether the numbers of a row or of a column lie side by side."""
    return 1 in tensor.stride()[-2:]


def _one(out_MN: Tensor, left_MK: Tensor, right_KN: Tensor, add: bool) -> None:
    num_rows, depth = left_MK.shape
    native.call(
        "products", left_MK, left_MK, *left_MK.stride(), right_KN, 0, *right_KN.stride(), out_MN, 0, out_MN.stride(0),
        [num_rows], -1, right_KN.shape[1], depth, add,
    )  # fmt: skip


def _split(counts: Sequence[int], *tensors_RX: Tensor) -> list[Sequence[Tensor]]:
    total = sum(counts)
    return [tensor[:total].split(list(counts)) for tensor in tensors_RX]
