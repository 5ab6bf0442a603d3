"""Cutting a model into stages."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from r1mega.config import ConfigError
from r1mega.pipeline.partition import Block, parse_placement, partition


def model(
    num_layers: int, num_mtp: int = 0, embedding: float = 0.1, layer: float = 1.0, mtp: float = 1.3, head: float = 2.0
) -> list[Block]:
    layers = [Block("t", i, layer) for i in range(num_layers)] + [Block("m", i, mtp) for i in range(num_mtp)]
    return [Block("E", 0, embedding), *layers, Block("L", 0, head)]


def picture(stages: list[list[Block]]) -> str:
    return "|".join("".join(block.kind for block in stage) for stage in stages)


def costs(stages: list[list[Block]]) -> list[float]:
    return [sum(block.cost for block in stage) for stage in stages]


def all_cuts(blocks: list[Block], num_stages: int) -> list[list[list[Block]]]:
    """Every legal cut, those with fuller early stages first."""
    inner = itertools.combinations(range(1, len(blocks)), num_stages - 1)
    cuts = [[blocks[a:b] for a, b in itertools.pairwise([0, *ends, len(blocks)])] for ends in inner]
    legal = [cut for cut in cuts if all(any(block.kind in "tm" for block in stage) for stage in cut)]
    return sorted(legal, key=lambda cut: [-len(stage) for stage in cut])


def test_the_cut_is_the_best_of_all_cuts() -> None:
    chance = random.Random(2)
    for _ in range(150):
        num_layers, num_mtp = chance.randint(1, 8), chance.randint(0, 2)
        few = chance.random() < 0.5  # few different costs make ties
        cost = lambda: chance.choice([1.0, 2.0]) if few else chance.random()  # noqa: B023, E731
        blocks = [dataclasses.replace(block, cost=cost()) for block in model(num_layers, num_mtp)]
        num_stages = chance.randint(1, num_layers + num_mtp)
        rule = lambda cut: (round(max(costs(cut)), 9), round(sum(c * c for c in costs(cut)), 9))  # noqa: E731
        assert partition(blocks, num_stages) == min(all_cuts(blocks, num_stages), key=rule)


def test_ties_go_to_the_even_cut_and_then_to_fuller_early_stages() -> None:
    assert picture(partition(model(9, embedding=0, head=0), 4)) == "Ettt|tt|tt|ttL"


def test_every_block_of_a_671b_model_is_placed_once_and_in_order() -> None:
    blocks = model(61, 1)
    stages = partition(blocks, 16)
    assert [block for stage in stages for block in stage] == blocks
    assert all(any(block.kind in "tm" for block in stage) for stage in stages)
    assert max(costs(stages)) == pytest.approx(4.3)


def test_free_blocks_are_cut_as_well() -> None:
    assert picture(partition(model(2, 0, 0, 0, 0, 0), 2)) == "Et|tL"


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        partition(model(3, 1), 5)
    assert str(caught.value) == (
        "pipeline stages=5: more stages than layers: "
        "model.num_layers (3) and model.num_mtp_layers (1) make 4; use at most 4"
    )


def test_a_placement_is_followed_to_the_letter() -> None:
    blocks = model(11, 1)
    stages = parse_placement("Et*3 | t*4 | t*4mL", blocks, 3)
    assert picture(stages) == "Ettt|tttt|ttttmL"
    assert [block for stage in stages for block in stage] == blocks
    assert picture(parse_placement("E|t*2|L", model(2), 3)) == "E|tt|L"


@pytest.mark.parametrize(
    ("text", "num_stages", "message"),
    [
        ("Et*2|tL", 3, "has 2 stages, the schedule has 3"),
        ("Et*3||L", 3, "stage 1 (counted from 0) is empty"),
        ("Et*2|L", 2, "places 2 of t (decoder layers), the model has 3"),
        ("Et*3|tL", 2, "places 4 of t (decoder layers), the model has 3"),
        ("Et*3|mL", 2, "places 1 of m (MTP layers), the model has 0"),
        ("t*3|L", 2, "places 0 of E (the embedding), the model has 1"),
        ("t*3|EL", 2, "the order must be E, then all t, then all m, then L"),
        ("Et3|L", 2, "cannot read 't3'; use E, t, m, L, | and t*3"),
        ("Et*0t*3|L", 2, "cannot read 't*0t*3'; use E, t, m, L, | and t*3"),
        ("Etttx|L", 2, "cannot read 'tx'; use E, t, m, L, | and t*3"),
        ("", 1, "stage 0 (counted from 0) is empty"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused_in_one_line(text: str, num_stages: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_placement(text, model(3), num_stages)
    assert str(caught.value) == f"parallel.placement={text}: {message}"
