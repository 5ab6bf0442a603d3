"""The two passes over a tile of logits of ``r1mega.kernels.policy_tile``: statistics, and the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega.kernels.triton.compat import cast, launch, padded, pieces

STATISTICS_BLOCK, GRADIENT_BLOCK = 4096, 4096
LOWEST = -3.0e38


def statistics(logits_CV: Tensor, targets_C: Tensor, scale: float) -> Tensor:
    """``[C, 4]`` float32, as of ``policy_tile.statistics``; a program reads a row, once.

    Args:
        logits_CV: contiguous.
        targets_C: ids in this part of the vocabulary; negative for one elsewhere.
        scale: 1 / temperature.
    """
    num_rows, width = logits_CV.shape
    found = torch.empty((num_rows, 4), dtype=torch.float32, device=logits_CV.device)
    if num_rows:
        arguments = logits_CV, targets_C, found, width, scale, min(padded(width), STATISTICS_BLOCK), LOWEST
        launch(_policy_statistics, (num_rows,), arguments, num_warps=8)
    return found


@triton.jit
def _policy_statistics(logits_CV, targets_C, found_C4, width, scale, BLOCK: tl.constexpr, LOWEST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_CV + row * width
    greatest = LOWEST
    # A sum for each place in the block, so that only the greatest is agreed on in every block.
    sums = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        scaled = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32) * scale
        now = tl.maximum(greatest, tl.max(tl.where(inside, scaled, LOWEST), 0))
        shift = greatest - now
        factor = tl.exp(shift)
        shifted = scaled - now
        powers = tl.where(inside, tl.exp(shifted), 0.0)
        moments = (moments + sums * shift) * factor + powers * shifted
        sums = sums * factor + powers
        greatest = now
    target = tl.load(targets_C + row)
    here = target >= 0
    of_target = tl.load(logits + tl.where(here, target, 0), mask=here, other=0.0).to(tl.float32) * scale
    tl.store(found_C4 + row * 4, greatest)
    tl.store(found_C4 + row * 4 + 1, tl.sum(sums, 0))
    tl.store(found_C4 + row * 4 + 2, tl.sum(moments, 0))
    tl.store(found_C4 + row * 4 + 3, of_target)


def gradient(
    logits_CV: Tensor,
    rows_K: Tensor | None,
    targets_K: Tensor,
    lse_K: Tensor,
    entropy_K: Tensor,
    of_log_prob_K: Tensor,
    of_entropy_K: Tensor,
    scale: float,
    out_KV: Tensor,
) -> None:
    """Writes the gradient of ``policy_tile.gradient`` to ``out_KV``; where all rows are wanted it may be the logits.

    Args:
        logits_CV: contiguous.
        rows_K: which rows are wanted; None for all.
        targets_K: see ``policy_tile.RowGradients``, as for the four after it, which are contiguous.
        lse_K: see there.
        entropy_K: see there.
        of_log_prob_K: see there.
        of_entropy_K: see there.
        scale: 1 / temperature.
        out_KV: contiguous, float32 or bfloat16.
    """
    num_rows, width = out_KV.shape
    if num_rows == 0:
        return
    block = min(padded(width), GRADIENT_BLOCK)
    arguments = (
        logits_CV, rows_K, targets_K, lse_K, entropy_K, of_log_prob_K, of_entropy_K, out_KV, width, scale, block
    )  # fmt: skip
    launch(_policy_gradient, (num_rows, pieces(width, block)), arguments, num_warps=8)


@triton.jit
def _policy_gradient(
    logits_CV, rows_K, targets_K, lse_K, entropy_K, of_log_prob_K, of_entropy_K, out_KV, width, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = index
    if rows_K is not None:
        row = tl.load(rows_K + index)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    logs = tl.load(logits_CV + row * width + column, mask=inside, other=0.0).to(tl.float32) * scale
    logs = logs - tl.load(lse_K + index)
    by_log_prob = tl.load(of_log_prob_K + index) * scale
    by_entropy = tl.load(of_entropy_K + index) * scale
    result = -tl.exp(logs) * (by_log_prob + by_entropy * (logs + tl.load(entropy_K + index)))
    result += tl.where(column == tl.load(targets_K + index), by_log_prob, 0.0)
    tl.store(out_KV + index * width + column, cast(result, out_KV.dtype.element_ty), mask=inside)
