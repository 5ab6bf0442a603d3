"""Advantages of groups, and which groups dynamic sampling keeps."""

from __future__ import annotations

import math

import pytest
import torch

from r1mega.rl.advantages import AdvantageOptions, group_advantages, reward_metrics, select_groups

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, -1.0, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)


def test_advantages_are_the_papers_formula():
    found = group_advantages(REWARDS, AdvantageOptions(epsilon=0))
    assert found.advantages[0].tolist() == [1, -1, -1, 1]
    assert found.mean.tolist() == pytest.approx([0.5, 0.5, 0.1])
    assert found.std.tolist() == pytest.approx([0.5, math.sqrt(4.5 / 4), 0])
    spread = found.advantages[:2].square().mean(dim=1)
    torch.testing.assert_close(spread, torch.ones(2, dtype=torch.float64))


def test_divisors_differ_by_the_root_of_their_quotient():
    paper, bessel = (group_advantages(REWARDS, AdvantageOptions(std_divisor=d, epsilon=0)) for d in ("n", "n-1"))
    torch.testing.assert_close(paper.advantages, bessel.advantages * math.sqrt(4 / 3))


def test_epsilon_is_added_to_the_standard_deviation():
    found = group_advantages(REWARDS, AdvantageOptions(epsilon=0.5)).advantages
    assert found[0].tolist() == [0.5, -0.5, -0.5, 0.5]


def test_without_the_standard_deviation_only_the_mean_goes():
    found = group_advantages(REWARDS, AdvantageOptions(divide_by_std=False)).advantages
    torch.testing.assert_close(found, REWARDS - REWARDS.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("epsilon", [0, 1e-6])
@pytest.mark.parametrize("divisor", ["n", "n-1"])
def test_flat_groups_have_no_advantage_at_all(divisor, epsilon):
    """0.1 + 0.1 + 0.1 is not 0.3: with a mean of rounded sums there would be something left to divide."""
    rewards = torch.full((5, 3), 0.1)
    found = group_advantages(rewards, AdvantageOptions(std_divisor=divisor, epsilon=epsilon))
    assert found.flat.all() and (found.advantages == 0).all() and (found.std == 0).all()
    alone = group_advantages(torch.tensor([[3.0], [-1.0]]), AdvantageOptions(std_divisor=divisor, epsilon=epsilon))
    assert alone.flat.all() and (alone.advantages == 0).all()


def test_groups_do_not_know_of_each_other_so_ranks_can_share_them():
    whole = group_advantages(REWARDS)
    parts = [group_advantages(row[None]) for row in REWARDS]
    assert torch.equal(whole.advantages, torch.cat([part.advantages for part in parts]))
    sums = reward_metrics(whole)
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {"num_groups": 3, "flat_groups": 1, "reward": 1.1, "reward_std": 0.5 + math.sqrt(4.5 / 4)}
    )
    of_parts = [reward_metrics(part) for part in parts]
    assert all(sum(part[name] for part in of_parts) == pytest.approx(sums[name].item()) for name in sums)


def test_dtype_is_that_of_the_rewards():
    assert group_advantages(torch.tensor([[1, 0]])).advantages.dtype == torch.float32
    assert group_advantages(REWARDS).advantages.dtype == torch.float64


def test_dynamic_sampling_keeps_the_first_groups_that_teach_something():
    flat = torch.tensor([True, False, False, True, False])
    few, enough = select_groups(flat, 4), select_groups(flat, 2)
    assert (few.kept, few.missing) == ([1, 2, 4], 1)
    assert (enough.kept, enough.missing) == ([1, 2], 0)
    more = select_groups([*flat.tolist(), True, False, False], 4)
    assert (more.kept, more.missing) == ([1, 2, 4, 6], 0)


def test_what_cannot_be_a_group_is_refused():
    with pytest.raises(ValueError, match=r"rewards is \[4\]: must be \[prompts, completions of each\]"):
        group_advantages(torch.ones(4))
    with pytest.raises(ValueError, match="rewards: must be finite"):
        group_advantages(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="std_divisor=G: must be n or n-1"):
        AdvantageOptions(std_divisor="G")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="epsilon=-1: must be at least 0"):
        AdvantageOptions(epsilon=-1)
