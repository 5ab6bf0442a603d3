"""First rows from the counts of tiles: the reference against its definition. The kernels' tests compare with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1mega.kernels.check import INTEGERS
from r1mega.kernels.permute import permute
from r1mega.kernels.route import TILE_TOKENS, rank_choices, reference_rank_choices
from r1mega.kernels.scan import first_rows, scan


def counts_of(num_tiles: int, num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tiles + num_experts)
    return torch.randint(0, 65, (num_tiles, num_experts), generator=generator)


@pytest.mark.parametrize("num_tiles", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("num_experts", [1, 5, 384])
def test_a_first_row_is_the_rows_of_experts_before_and_of_the_expert_in_tiles_before(num_tiles, num_experts):
    tile_counts = counts_of(num_tiles, num_experts)
    first_row, counts, sums = scan(tile_counts)
    row, expected = 0, torch.empty_like(tile_counts)
    for expert in range(num_experts):
        for tile in range(num_tiles):
            expected[tile, expert] = row
            row += int(tile_counts[tile, expert])
    assert torch.equal(first_row, expected) and torch.equal(counts, tile_counts.sum(0)) and sums is None
    if num_tiles == 1:
        assert torch.equal(first_rows(counts), first_row[0])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_counts_may_be_integers_of_any_type_and_first_rows_do_not_overflow_theirs(dtype):
    for num_tiles in (1, 7):
        tile_counts = counts_of(num_tiles, 60)
        actual, expected = scan(tile_counts.to(dtype)), scan(tile_counts)
        for got, wanted in zip(actual[:2], expected[:2], strict=True):
            assert got.dtype == torch.int64 and torch.equal(got, wanted)


def test_sums_of_scores_are_added_over_the_tiles_and_have_no_gradient():
    tile_sums = torch.randn(7, 60, requires_grad=True)
    sums = scan(counts_of(7, 60), tile_sums)[2]
    assert sums is not None and not sums.requires_grad
    torch.testing.assert_close(sums, tile_sums.detach().sum(0))


def test_ranks_of_tiles_with_scanned_first_rows_lead_where_ranks_over_all_tokens_do(implementation):
    experts = torch.rand(200, 9, generator=torch.Generator().manual_seed(0)).topk(3).indices
    tiles = [reference_rank_choices(tile, 9) for tile in experts.split(TILE_TOKENS)]
    first_row, counts, _ = scan(torch.stack([counts for _, counts in tiles]).int())
    x, weights = torch.randn(200, 4), torch.rand(200, 3)
    by_tile = permute(x, weights, experts, torch.cat([ranks for ranks, _ in tiles]), counts, first_row_NE=first_row)
    over_all = permute(x, weights, experts, *rank_choices(experts, 9))
    assert torch.equal(by_tile[0], over_all[0]) and torch.equal(by_tile[1], over_all[1])
