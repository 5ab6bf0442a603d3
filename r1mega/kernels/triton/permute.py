"""Where each routed row stands, and the copy of the tokens to their rows, in two launches after ``route``'s.

Tokens come in tiles of :data:`TILE_TOKENS`. ``scan`` turns each tile's counts into the first row of each tile and
expert; a choice's row is that plus its rank inside the tile, which is computed inside the copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega.kernels.triton.combine import BLOCK
from r1mega.kernels.triton.compat import launch, padded, pieces

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


def permute(
    input_TH: Tensor,
    experts_TK: Tensor,
    ranks_TK: Tensor,
    first_row_NE: Tensor,
    num_rows: int | None = None,
    padded_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Copy each token to its routed rows; any type of number.

    Args:
        input_TH: ``[T, H]``, a row's numbers side by side; there may be gaps between rows.
        experts_TK: ``[T, K]`` int64, contiguous; E marks a dropped choice.
        ranks_TK: ``[T, K]`` int64, contiguous: of each choice among its tile's for the same expert.
        first_row_NE: ``[N, E]`` int64, contiguous, from :func:`scan`; or ``[1, E]`` where ranks count all tokens.
        num_rows: R; by default T * K.
        padded_rows: whether some rows belong to no choice; they become zero.

    Returns:
        rows ``[R, H]`` and the row of each choice, ``[T, K]`` int64, -1 where it was dropped.
    """
    (num_tokens, top_k), width = experts_TK.shape, input_TH.shape[1]
    num_tiles, num_experts = first_row_NE.shape
    assert num_tiles in (1, pieces(num_tokens, TILE_TOKENS)), "first_row_NE has the tiles of other tokens"
    row_of_choice = torch.empty_like(experts_TK)
    make = input_TH.new_zeros if padded_rows else input_TH.new_empty
    rows = make(num_tokens * top_k if num_rows is None else num_rows, width)
    if num_tokens == 0:
        return rows, row_of_choice
    block = min(padded(width), BLOCK)
    tile_tokens = TILE_TOKENS if num_tiles > 1 else num_tokens
    arguments = (
        input_TH, experts_TK, ranks_TK, first_row_NE, row_of_choice, rows, input_TH.stride(0), width, num_experts,
        tile_tokens, top_k, block,
    )  # fmt: skip
    launch(_permute, (num_tokens, max(pieces(width, block), 1)), arguments, num_warps=4)
    return rows, row_of_choice


@triton.jit
def _permute(
    input_TH, experts_TK, ranks_TK, first_row_NE, row_of_choice_TK, rows_RH, input_step, width, num_experts,
    tile_tokens, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(input_TH + token * input_step + column, mask=column < width)
    first_of_tile = first_row_NE + token // tile_tokens * num_experts
    for k in tl.static_range(TOP_K):
        expert = tl.load(experts_TK + token * TOP_K + k)
        kept = expert < num_experts
        row = tl.load(first_of_tile + expert, mask=kept, other=0) + tl.load(ranks_TK + token * TOP_K + k)
        row = tl.where(kept, row, -1)
        if tl.program_id(1) == 0:
            tl.store(row_of_choice_TK + token * TOP_K + k, row)
        tl.store(rows_RH + row * width + column, values, mask=column < tl.where(kept, width, 0))
