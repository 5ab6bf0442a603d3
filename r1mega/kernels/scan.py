"""From the counts of each tile of tokens to the first row of each tile and expert.

Rows of an expert stand together, experts in order; among them those of a tile, tiles in order. So the first row of a
tile and expert is the sum of all counts of experts before, and of this expert's counts in tiles before: an exclusive
sum over the transposed histogram. It is one of integers, and has no gradient.
Shapes: N tiles, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1mega.kernels import check, cuda, triton


def scan(tile_counts_NE: Tensor, tile_score_sums_NE: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """First rows and counts; beside them, since the tiles are read anyway, the sum of what each tile has summed.

    The kernels run for int32 counts, as a GPU's ``route`` and ``rank_choices`` give them. A CPU has all tokens in one
    tile, and E numbers to add: that is PyTorch's, as is everything without numbers.

    Args:
        tile_counts_NE: ``[N, E]`` integers, choices of each tile for each expert.
        tile_score_sums_NE: ``[N, E]``, of the scores of each tile; no gradient.

    Returns:
        first rows ``[N, E]`` int64, counts ``[E]`` int64 and score sums ``[E]``; None where none were given.

    Raises:
        ValueError: for counts that are not integers, or shapes that do not fit.
    """
    check.matrix("tile_counts_NE", tile_counts_NE)
    if tile_counts_NE.dtype not in check.INTEGERS:
        raise ValueError(f"tile_counts_NE: must be integers, not {tile_counts_NE.dtype}")
    if tile_score_sums_NE is not None:
        check.shaped("tile_score_sums_NE", tile_score_sums_NE, tile_counts_NE.shape, tile_counts_NE.device)
        tile_score_sums_NE = tile_score_sums_NE.detach().contiguous()
    if tile_counts_NE.dtype == torch.int32:
        floats = tile_score_sums_NE is None or tile_score_sums_NE.dtype == torch.float32
        if floats and cuda.takes(tile_counts_NE, tile_score_sums_NE):
            return cuda.scan(tile_counts_NE.contiguous(), tile_score_sums_NE)
        if triton.takes(tile_counts_NE, dtypes=(torch.int32,)):
            from r1mega.kernels.triton.scan import scan as by_triton

            return *by_triton(tile_counts_NE.contiguous()), _sum(tile_score_sums_NE)
    return reference_scan(tile_counts_NE, tile_score_sums_NE)


def reference_scan(
    tile_counts_NE: Tensor, tile_score_sums_NE: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`scan` in PyTorch's operations."""
    tile_counts_NE = tile_counts_NE.to(torch.int64)
    if tile_counts_NE.shape[0] == 1:
        return first_rows(tile_counts_NE), tile_counts_NE[0], _sum(tile_score_sums_NE)
    counts_E, before_NE = tile_counts_NE.sum(0), tile_counts_NE.cumsum(0) - tile_counts_NE
    return before_NE.add_(first_rows(counts_E)), counts_E, _sum(tile_score_sums_NE)


def first_rows(counts_E: Tensor) -> Tensor:
    """The first row of each expert, ``[..., E]``, where all tokens are in one tile: :func:`scan` without its checks."""
    return counts_E.cumsum(-1) - counts_E


def _sum(tile_score_sums_NE: Tensor | None) -> Tensor | None:
    return None if tile_score_sums_NE is None else tile_score_sums_NE.sum(0)
