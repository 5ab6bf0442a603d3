"""Every schedule trains the tiny mixture of experts with the gradients of a single process."""

from __future__ import annotations

import functools

import pytest

from r1mega.config import SCHEDULE_NAMES, ParallelConfig
from tests.distributed.test_same_numbers import assert_same
from tests.distributed.training import Job, Report, tiny_model, train

NUM_STEPS = 2


@functools.cache
def expected(pool, num_layers: int, changing_shapes: bool) -> Report:
    job = Job(tiny_model(num_layers=num_layers), ParallelConfig(), NUM_STEPS, 1, changing_shapes=changing_shapes)
    return pool.run(train, 1, job)[0]


def check(pool, world_size: int, parallel: ParallelConfig, num_layers: int = 4, changing_shapes: bool = False) -> None:
    job = Job(tiny_model(num_layers=num_layers), parallel, NUM_STEPS, 1, changing_shapes=changing_shapes)
    assert_same(pool.run(train, world_size, job)[0], expected(pool, num_layers, changing_shapes))


@pytest.mark.parametrize("changing_shapes", [False, True], ids=["", "changing_shapes"])
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_on_two_ranks(pool, schedule, changing_shapes):
    check(pool, 2, ParallelConfig(pp=2, schedule=schedule), changing_shapes=changing_shapes)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_on_four_ranks_with_expert_parallelism_and_fsdp(pool, schedule):
    """dp=2: FSDP2 cuts what is dense, ep=2 the experts."""
    check(pool, 4, ParallelConfig(pp=2, ep=2, schedule=schedule))


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_the_same_with_changing_shapes_and_recomputation(pool, schedule):
    """The ranks that exchange tokens have sequences of different lengths, too."""
    check(pool, 4, ParallelConfig(pp=2, ep=2, schedule=schedule, recompute=True), changing_shapes=True)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_on_a_pipeline_of_four_ranks_with_recomputation(pool, schedule):
    check(pool, 4, ParallelConfig(pp=4, schedule=schedule, recompute=True), num_layers=8)
