"""The copy of the tokens to their rows, with the map of where they went.

Tokens come in tiles of :data:`TILE_TOKENS`. A choice's row is the first row of its tile and expert (``scan``) plus its
rank inside the tile, which is computed inside the copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1mega.kernels.triton.combine import BLOCK
from r1mega.kernels.triton.compat import launch, padded, pieces
from r1mega.kernels.triton.scan import TILE_TOKENS
from r1mega.kernels.triton.scan import scan as scan  # whose result permute takes


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
