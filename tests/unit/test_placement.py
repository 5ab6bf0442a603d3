"""Where experts go: every expert has a place, groups stay on their nodes, and the busiest rank is near the optimum."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest
import torch

from r1mega.moe.placement import Placement, gain, in_order, max_over_mean, pack, place_experts, replicate


def zipf(num_experts: int, skew: float, seed: int = 0) -> list[float]:
    load = [1000 / (rank + 1) ** skew for rank in range(num_experts)]
    random.Random(seed).shuffle(load)
    return load


def all_copies(num_experts: int, num_slots: int, most: int) -> Iterator[tuple[int, ...]]:
    more = num_slots - num_experts
    for extra in itertools.product(range(more + 1), repeat=num_experts):
        if sum(extra) == more and max(extra) < most:
            yield tuple(1 + n for n in extra)


def least_of_busiest(items: tuple[float, ...], num_bins: int, size: int) -> float:
    """By brute force: the least weight that the fullest of equally large bins can have."""
    if num_bins == 1:
        return sum(items)
    first, rest = items[0], range(1, len(items))  # the first item lies in the first bin
    best = float("inf")
    for chosen in itertools.combinations(rest, size - 1):
        here = first + sum(items[i] for i in chosen)
        others = tuple(items[i] for i in rest if i not in chosen)
        if here < best:
            best = min(best, max(here, least_of_busiest(others, num_bins - 1, size)))
    return best


@pytest.mark.parametrize("num_experts, num_ranks, slots", [(4, 2, 2), (4, 2, 3), (6, 2, 4), (5, 3, 2), (6, 3, 3)])
def test_the_busiest_rank_is_near_the_best_of_all_placements(num_experts, num_ranks, slots):
    ratios = []
    for seed in range(12):
        load = [random.Random(seed + 100 * e).expovariate(1.0) for e in range(num_experts)]
        found = max(place_experts(load, num_ranks, slots).load_of_ranks(load))
        best = min(
            least_of_busiest(
                tuple(share / n for share, n in zip(load, copies, strict=True) for _ in range(n)), num_ranks, slots
            )
            for copies in all_copies(num_experts, num_ranks * slots, num_ranks)
        )
        ratios.append(found / best)
    assert min(ratios) > 1 - 1e-9, "better than the best: the count is wrong"
    assert max(ratios) < 1.2 and sum(ratios) / len(ratios) < 1.08


def test_packing_alone_is_near_the_best():
    ratios = []
    for seed in range(40):
        items = tuple(random.Random(seed + 100 * i).expovariate(1.0) for i in range(9))
        bins = pack(items, 3)
        assert sorted(itertools.chain(*bins)) == list(range(9)) and {len(b) for b in bins} == {3}
        ratios.append(max(sum(items[i] for i in b) for b in bins) / least_of_busiest(items, 3, 3))
    assert max(ratios) < 1.08 and sum(ratios) / len(ratios) < 1.005


def test_no_other_numbers_of_copies_give_a_lighter_copy():
    for seed in range(20):
        load = [random.Random(seed + 100 * e).expovariate(1.0) for e in range(5)]
        found = max(share / n for share, n in zip(load, replicate(load, 8, 8), strict=True))
        best = min(max(s / n for s, n in zip(load, copies, strict=True)) for copies in all_copies(5, 8, 8))
        assert found == pytest.approx(best)


@pytest.mark.parametrize("num_groups, num_nodes", [(1, 1), (8, 2), (8, 4), (4, 4)])
def test_every_expert_has_a_place_every_slot_an_expert_and_groups_stay_on_their_node(num_groups, num_nodes):
    placement = place_experts(zipf(64, 1.0), 8, 10, num_groups, num_nodes)
    assert [len(of_rank) for of_rank in placement.experts] == [10] * 8
    assert min(placement.copies) == 1 and sum(placement.copies) == 80 and len(placement.copies) == 64
    nodes_of_group: dict[int, set[int]] = {}
    for rank, experts in enumerate(placement.experts):
        assert len(set(experts)) == len(experts), "two copies of an expert on one rank"
        for expert in experts:
            nodes_of_group.setdefault(expert * num_groups // 64, set()).add(rank * num_nodes // 8)
    if num_nodes > 1:
        assert all(len(nodes) == 1 for nodes in nodes_of_group.values())


def test_a_rank_never_holds_two_copies_of_one_expert():
    for seed in range(400):
        draw = random.Random(seed)
        num_experts, num_ranks = draw.choice([4, 8, 16]), draw.choice([2, 3, 4])
        slots = draw.randint(-(-num_experts // num_ranks), num_experts)
        load = [draw.expovariate(1.0) * draw.choice([0, 1, 10]) for _ in range(num_experts)]
        for of_rank in place_experts(load, num_ranks, slots).experts:
            assert len(set(of_rank)) == slots, seed


def test_a_skewed_load_is_evened_out():
    load = zipf(64, 1.0)
    before, after = gain(load, place_experts(load, 8, 10))
    assert before > 1.5 and after < 1.02
    assert gain(load, in_order(64, 8)) == (before, before)


def test_an_even_load_and_no_load_stay_even():
    assert gain([5.0] * 16, place_experts([5.0] * 16, 4, 4)) == (1.0, 1.0)
    assert max_over_mean([0.0, 0.0]) == 1.0
    assert sum(place_experts([0.0] * 16, 4, 5).copies) == 20


def test_choices_go_to_copies_of_their_expert_in_turn():
    placement = Placement(((0, 1), (1, 2)))
    experts = torch.tensor([[0, 1], [1, 2], [1, 0], [2, 1]])
    assert placement.slots_of(experts).tolist() == [[0, 1], [2, 3], [1, 0], [3, 2]]


def test_the_measured_load_of_copies_is_what_was_planned():
    load = zipf(16, 1.2)
    placement = place_experts(load, 4, 5)
    drawn = torch.multinomial(torch.tensor(load), 40_000, True, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=16).tolist()
    of_ranks = torch.bincount(placement.slots_of(drawn.unsqueeze(1)).flatten() // 5, minlength=4).tolist()
    assert of_ranks == pytest.approx(placement.load_of_ranks(counts), rel=0.02)


@pytest.mark.parametrize(
    "numbers, text",
    [((2, 3), "cannot hold 8"), ((4, 2, 3, 1), "3 does not divide 8"), ((4, 2, 4, 3), "3 does not divide 4")],
)
def test_what_cannot_be_placed_is_said(numbers, text):
    with pytest.raises(ValueError, match=text):
        place_experts([1.0] * 8, *numbers)


@pytest.mark.parametrize("tokens", [-1.0, math.nan, math.inf])
def test_a_load_that_nothing_can_have_is_refused_and_not_exchanged_for_ever(tokens):
    with pytest.raises(ValueError, match=rf"load\[3\]={tokens}: must be a finite number, 0 at least"):
        place_experts([tokens if expert == 3 else 1.0 for expert in range(8)], 4, 3)


@pytest.mark.parametrize(
    "load, numbers, text",
    [
        ([], (1, 1), "load: there must be 1"), ([1.0], (0, 1), "num_ranks: there must be 1"),
        ([1.0], (1, 1, 0), "num_groups: there must be 1"), ([1.0], (1, 1, 1, 0), "num_nodes: there must be 1"),
    ],
)  # fmt: skip
def test_nothing_is_placed_of_nothing_and_on_nothing(load, numbers, text):
    with pytest.raises(ValueError, match=text):
        place_experts(load, *numbers)
