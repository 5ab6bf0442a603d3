"""DeepSeek-R1 itself, built on the meta device and cut over 2,048 ranks: nothing is lost, nothing is there twice."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch

from r1mega.config import Config
from r1mega.kernels.parameter import local
from r1mega.model.blocks import place_blocks
from r1mega.model.init import local_slices
from r1mega.model.stage import Stage, build_stage
from r1mega.parallel_state import Layout, ParallelState
from r1mega.settings import parse_config
from r1mega.train.sharding import named_shards, shard
from tests.distributed.worlds import fake_world

R1_YAML = Path(__file__).parents[2] / "examples/configs/r1_671b.yaml"
WORLD = 2048
MAIN, MTP, EMBEDDING = 671_026_419_200, 11_610_068_224, 129_280 * 7168
ROUTER_BIASES = 256 * (58 + 1)


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(["--config", str(R1_YAML)])


@pytest.fixture(scope="module")
def layout(config) -> Layout:
    return Layout.from_config(config.parallel, WORLD)


def build(config: Config, layout: Layout, rank: int) -> Stage:
    state = ParallelState(layout)
    placed = place_blocks(config.model, config.parallel, config.data.sequence_length, layout.pp)
    stage = build_stage(config.model, state, placed[state.rank_in("pp")], torch.bfloat16, "meta")
    shard(stage, state, torch.bfloat16)
    return stage


def elements(parameter: torch.Tensor, coordinates: dict[str, int]) -> int:
    return prod(part.stop - part.start for part in local_slices(parameter, coordinates))


def test_the_layout_is_tp1_pp16_ep64(layout):
    assert (layout.tp, layout.pp, layout.ep, layout.dp, layout.edp) == (1, 16, 64, 128, 2)


def test_parameters_of_all_ranks_add_up_to_the_model(config, layout):
    total, biases, largest = 0, 0, 0
    for ranks in zip(*layout.groups("pp"), strict=True):  # the ranks of one stage
        with fake_world(ranks[0], WORLD):
            stage = build(config, layout, ranks[0])
            shards = named_shards([stage])
            biases += sum(buffer.numel() for name, buffer in stage.named_buffers() if name.endswith("correction_bias"))
            coordinates = [layout.coordinates(rank) for rank in ranks]
            of_rank = [sum(elements(parameter, where) for _, parameter in shards) for where in coordinates]
            total, largest = total + sum(of_rank), max(largest, *of_rank)
    holds_mtp_elsewhere = EMBEDDING  # the MTP layer's stage has a copy of the embedding table
    assert biases == ROUTER_BIASES
    assert total == MAIN + MTP + holds_mtp_elsewhere - ROUTER_BIASES
    assert largest < 1.5 * total / WORLD, f"{largest:,} elements on one rank, {total / WORLD:,.0f} on average"


@pytest.mark.parametrize("rank", [0, 77, 128 * 7 + 64, 2047])
def test_a_rank_really_holds_what_the_arithmetic_says(config, layout, rank):
    with fake_world(rank, WORLD):
        for name, parameter in named_shards([build(config, layout, rank)]):
            assert local(parameter).numel() == elements(parameter, layout.coordinates(rank)), name
