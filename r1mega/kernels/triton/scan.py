"""The first row of each tile and expert, in one program: the histograms of all tiles are small."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega.kernels.triton.compat import launch, padded

TILE_TOKENS = 64
SCANNED_AT_ONCE = 4096


def scan(tile_counts_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, then by tile.

    Args:
        tile_counts_NE: ``[N, E]`` int32, choices of each tile of tokens for each expert; contiguous.

    Returns:
        The first row of each tile and expert, ``[N, E]`` int64, and the rows of each expert, ``[E]`` int64.
    """
    num_tiles, num_experts = tile_counts_NE.shape
    first_row = tile_counts_NE.new_empty(num_tiles, num_experts, dtype=torch.int64)
    counts = tile_counts_NE.new_empty(num_experts, dtype=torch.int64)
    width = padded(num_experts)
    tiles_at_once = max(SCANNED_AT_ONCE // width, 1)
    arguments = tile_counts_NE, first_row, counts, num_tiles, num_experts, width, tiles_at_once
    launch(_scan, (1,), arguments, num_warps=8)
    return first_row, counts


@triton.jit
def _scan(
    tile_counts_NE, first_row_NE, counts_E, num_tiles, NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, WIDTH)
    counts = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, num_tiles, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)
        inside = (tile < num_tiles)[:, None] & (expert < NUM_EXPERTS)[None, :]
        place = tile[:, None] * NUM_EXPERTS + expert[None, :]
        counts += tl.sum(tl.load(tile_counts_NE + place, mask=inside, other=0), 0)
    tl.store(counts_E + expert, counts.to(tl.int64), mask=expert < NUM_EXPERTS)
    first = tl.cumsum(counts, 0) - counts
    for start in range(0, num_tiles, AT_ONCE):
        tile = start + tl.arange(0, AT_ONCE)
        inside = (tile < num_tiles)[:, None] & (expert < NUM_EXPERTS)[None, :]
        place = tile[:, None] * NUM_EXPERTS + expert[None, :]
        of_tile = tl.load(tile_counts_NE + place, mask=inside, other=0)
        before = first[None, :] + tl.cumsum(of_tile, 0) - of_tile
        tl.store(first_row_NE + place, before.to(tl.int64), mask=inside)
        first += tl.sum(of_tile, 0)
