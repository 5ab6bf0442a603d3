"""Completions and expert choices change ranks whole, whoever has how many."""

from __future__ import annotations

import torch
import torch.distributed as dist

from r1mega.rl.samples import Sample, exchange, share_experts

K, LAYERS = 2, (1, 2, 5)
RECORDED = {1: 0, 2: 1, 5: 1}


def sample(index: int, layers: tuple[int, ...] = LAYERS) -> Sample:
    num_prompt, num_tokens = 1 + index % 3, 1 + index % 4
    rows = num_prompt + num_tokens - 1
    experts = {i: torch.arange(rows * K, dtype=torch.int16).view(rows, K) + 100 * index + i for i in layers}
    log_probs = torch.full((num_tokens,), -1.0 - index)
    return Sample(index, [7] * num_prompt, [index] * num_tokens, index / 3, log_probs, experts=experts)


def assert_is(found: Sample, layers: tuple[int, ...] = LAYERS) -> None:
    expected = sample(found.index, layers)
    assert (found.prompt, found.tokens, found.advantage) == (expected.prompt, expected.tokens, expected.advantage)
    assert torch.equal(found.rollout_log_probs, expected.rollout_log_probs)
    assert found.experts.keys() == set(layers)
    assert all(torch.equal(found.experts[layer], rows) for layer, rows in expected.experts.items())


def _exchange(rank: int, world_size: int) -> list[int]:
    """All samples are rank 0's and 2's; all go to ranks 1 and 2."""
    mine = [sample(index) for index in ({0: [4, 0, 2], 2: [1, 3]}.get(rank, []))]
    found = exchange(mine, [1 + each.index % 2 for each in mine], dist.group.WORLD)
    for each in found:
        assert_is(each)
    return [each.index for each in found]


def test_samples_go_to_their_owners_from_ranks_with_any_number_of_them(pool) -> None:
    assert pool.run(_exchange, 3) == [[], [0, 2, 4], [1, 3]]


def _share(rank: int, world_size: int) -> None:
    """Two directions: sample i < 2 is trained where it was recorded, the others on the other rank."""
    own = tuple(layer for layer, owner in RECORDED.items() if owner == rank)
    other = tuple(layer for layer in LAYERS if layer not in own)
    samples = [sample(index, own) for index in range(4)]
    sets = [tuple(layer for layer, owner in RECORDED.items() if owner == r) for r in (0, 1)]
    wanted = [[sets[r]] * 2 + [sets[1 - r]] * 2 for r in (0, 1)]
    share_experts(samples, wanted, RECORDED, K, dist.group.WORLD)
    for index, each in enumerate(samples):
        assert_is(each, own if index < 2 else own + other)


def test_the_second_direction_gets_the_choices_that_the_other_rank_recorded(pool) -> None:
    pool.run(_share, 2)
