"""GRPO under any layout, microbatching, padding, packing and schedule gives the numbers of one process."""

from __future__ import annotations

import functools

import pytest
import torch

from r1mega.config import ParallelConfig
from r1mega.rl.options import LossOptions
from tests.distributed.grpo_steps import Job, update

LAYOUTS = {
    "pp2_gpipe": (2, dict(pp=2, schedule="gpipe")),
    "pp2_zb_h1_ep2": (4, dict(pp=2, ep=2, schedule="zb-h1")),
    "pp2_dualpipev_ep2": (4, dict(pp=2, ep=2, schedule="dualpipev")),
    "pp2_recompute": (2, dict(pp=2, recompute=True)),
    "tp2_pp2": (4, dict(tp=2, pp=2)),
    "tp2_ep2_dp2": (4, dict(tp=2, ep=2)),
}
# enough microbatches for every schedule: one sample each
SMALL = dict(microbatch_size=1)


def assert_same(actual, expected) -> None:
    assert not actual.disagreements
    assert actual.norms == pytest.approx(expected.norms, rel=1e-9)
    for mine, other in zip(actual.losses, expected.losses, strict=True):
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-9)
    for mine, other in zip(actual.gradients, expected.gradients, strict=True):
        assert mine.keys() == other.keys()
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for name, parameter in actual.parameters.items():
        torch.testing.assert_close(parameter, expected.parameters[name], rtol=1e-9, atol=1e-9)


@functools.cache
def reference(pool):
    return pool.run(update, 1, Job())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_gradients_of_one_process_with_replayed_experts(pool, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    report = pool.run(update, world_size, Job(parallel=ParallelConfig(**parallel), **SMALL))[0]
    assert_same(report, reference(pool))


@pytest.mark.parametrize(
    "schedule", ["1f1b", "interleaved", "looped-bfs", "zb-h2", "zbv", "v-half", "v-min", "dualpipe", "auto"]
)
def test_every_other_schedule_gives_them_too(pool, schedule: str) -> None:
    job = Job(parallel=ParallelConfig(pp=2, schedule=schedule), num_steps=1, **SMALL)
    actual, expected = pool.run(update, 2, job)[0], reference(pool)
    assert actual.norms == pytest.approx(expected.norms[:1], rel=1e-9)
    for name, gradient in actual.gradients[0].items():
        torch.testing.assert_close(gradient, expected.gradients[0][name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("microbatch_size", [1, 4, 8])
def test_microbatching_changes_nothing(pool, microbatch_size: int) -> None:
    assert_same(pool.run(update, 1, Job(microbatch_size=microbatch_size))[0], reference(pool))


@pytest.mark.parametrize(("world_size", "parallel"), [(1, {}), (2, dict(tp=2)), (2, dict(pp=2, schedule="zb-h1"))])
def test_packing_changes_nothing(pool, world_size: int, parallel: dict) -> None:
    job = Job(pack=True, microbatch_size=4 if world_size == 1 else 2, parallel=ParallelConfig(**parallel))
    assert_same(pool.run(update, world_size, job)[0], reference(pool))


@pytest.mark.parametrize("options", [
    LossOptions(ratio="sequence", kl_coefficient=0.1), LossOptions(aggregation="token", entropy_coefficient=0.01),
    LossOptions(aggregation="constant", constant=8.0, kl_coefficient=0.0, correction="truncate", cispo=True),
], ids=["gspo", "dapo", "cispo"])  # fmt: skip
def test_variants_of_the_objective_do_not_depend_on_the_layout_either(pool, options: LossOptions) -> None:
    expected = pool.run(update, 1, Job(options=options, num_steps=1))[0]
    report = pool.run(
        update, 4, Job(options=options, num_steps=1, pack=True, parallel=ParallelConfig(tp=2, ep=2), microbatch_size=2)
    )[0]
    assert_same(report, expected)


def test_ppo_with_its_value_head_does_not_depend_on_the_layout(pool) -> None:
    expected = pool.run(update, 1, Job(ppo=True))[0]
    assert expected.gradients[0]["value_head.weight"].abs().max() > 1e-6
    report = pool.run(update, 4, Job(ppo=True, parallel=ParallelConfig(tp=2, pp=2, schedule="zb-h1"), **SMALL))[0]
    assert_same(report, expected)


def test_replayed_experts_are_used_and_the_router_still_learns(pool) -> None:
    """The made-up experts are not the router's choice, so that replay changes the gradients of everything."""
    replayed, live = reference(pool), pool.run(update, 1, Job(replay=False))[0]
    name = "layers.2.mlp.gate.weight"
    assert replayed.gradients[0][name].abs().max() > 1e-6
    assert not torch.allclose(replayed.gradients[0][name], live.gradients[0][name], rtol=1e-3)
    agreements = [value for key, value in replayed.losses[0].items() if key.endswith("mlp.gate")]
    assert len(agreements) == 3 and all(0 < value < 0.9 for value in agreements)


def test_a_planted_bug_is_caught(pool) -> None:
    report = pool.run(update, 2, Job(parallel=ParallelConfig(tp=2), sabotage=_skip_finish, num_steps=1, **SMALL))[0]
    with pytest.raises(AssertionError):
        assert_same(report, reference(pool))


def _skip_finish(gradients) -> None:
    gradients.finish = lambda: None
