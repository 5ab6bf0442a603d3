"""Learning-rate schedules."""

from __future__ import annotations

import math

import pytest

from r1mega.config import OptimizerConfig
from r1mega.optim.schedule import learning_rate

STEPS = 100


def rates(**settings) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, **settings)
    return [learning_rate(step, config, STEPS) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_warm_up_is_linear_from_zero_to_the_peak(schedule):
    found = rates(schedule=schedule, warmup_steps=10, decay_steps=20)[:10]
    assert found == pytest.approx([i / 10 for i in range(1, 11)])


def test_without_warm_up_the_first_step_is_near_the_peak():
    assert rates(schedule="cosine", warmup_steps=0)[0] == pytest.approx(1.0, rel=1e-3)


def test_cosine_ends_at_the_minimum_and_is_halfway_in_the_middle():
    found = rates(schedule="cosine", warmup_steps=10)
    assert found[-1] == pytest.approx(0.1)
    assert found[54] == pytest.approx(0.55)
    assert found[31] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90)))


def test_constant_stays_at_the_peak():
    assert set(rates(schedule="constant", warmup_steps=5)[4:]) == {1.0}


def test_wsd_is_flat_then_falls_linearly_to_the_minimum_in_the_last_steps():
    found = rates(schedule="wsd", warmup_steps=10, decay_steps=20)
    assert set(found[9:80]) == {1.0}
    assert found[80:] == pytest.approx([1.0 - 0.9 * i / 20 for i in range(1, 21)])


def test_wsd_without_decay_stays_at_the_peak():
    assert rates(schedule="wsd", warmup_steps=10, decay_steps=0)[-1] == 1.0


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert [learning_rate(step, config, 3) for step in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_a_step_behind_the_end_keeps_the_last_rate(schedule):
    config = OptimizerConfig(schedule=schedule, decay_steps=5)
    assert learning_rate(STEPS + 7, config, STEPS) == pytest.approx(learning_rate(STEPS, config, STEPS))
