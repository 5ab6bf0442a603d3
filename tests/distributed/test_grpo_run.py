"""A whole GRPO run is the same run under every layout, and every step of it does what it says."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from r1mega.config import Config
from r1mega.config.rl import RewardConfig
from r1mega.rl.experience import ROUND
from r1mega.rl.options import LossOptions
from r1mega.rl.prompts import prompt_index, read_prompts
from r1mega.rl.rollout.engine import Completion
from tests.distributed.grpo_run import NAMES, REWARDS, Result, Seen, in_folder, make_config, result, run, write_data
from tests.distributed.pool import PoolError

# The parts under more layouts: test_rollout.py, test_grpo_same_numbers.py.
LAYOUTS = {
    "dp2": (2, {}),
    "pp2_zbv": (2, dict(pp=2, schedule="zbv")),
    "pp2_dualpipe_ep2": (4, dict(pp=2, ep=2, schedule="dualpipe")),
    "tp2_ep4": (4, dict(tp=2, ep=4)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def single(pool, data, tmp_path_factory) -> Result:
    """One process, with rewards in processes and pictures as a user has them."""
    folder = tmp_path_factory.mktemp("single") / "run"
    config = in_folder(make_config(data), folder)
    assert pool.run(run, 1, config, 0.0, True)[0].status == 0
    names = {path.name for path in folder.iterdir()}
    kept = {"checkpoints", "completions", "config.yaml", "data.json", "evaluations.jsonl", "metrics.jsonl"}
    assert names == kept | {"tensorboard", "learning.png", "objective.png"}
    return result(folder)


def job(pool, config: Config, folder: Path, world_size: int = 1, **parallel: Any) -> Result:
    seen = pool.run(run, world_size, in_folder(config, folder, parallel=parallel))
    assert all(each.status == 0 for each in seen)
    return result(folder)


def assert_same(actual: Result, expected: Result) -> None:
    assert len(actual.completions) == len(expected.completions)
    for mine, other in zip(actual.completions, expected.completions, strict=True):
        assert mine | {"advantage": 0} == other | {"advantage": 0}
        assert mine["advantage"] == pytest.approx(other["advantage"], rel=1e-9)
    assert len(actual.metrics) == len(expected.metrics)
    for mine, other in zip(actual.metrics, expected.metrics, strict=True):
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-9)
    assert [line["step"] for line in actual.evaluations] == [line["step"] for line in expected.evaluations]
    for mine, other in zip(actual.evaluations, expected.evaluations, strict=True):
        assert mine == pytest.approx(other, rel=1e-12)
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in actual.tensors.items():
        torch.testing.assert_close(
            tensor, expected.tensors[name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_run_of_one_process_has_all_that_the_recipe_has(single: Result) -> None:
    assert [line["step"] for line in single.metrics] == [2, 4, 6]
    assert [line["step"] for line in single.evaluations] == [0, 4, 6]
    assert len(single.completions) == 3 * 16 and [line["step"] for line in single.completions[::16]] == [1, 3, 5]
    assert all(line["reward_std"] > 0 and line["grad_norm"] > 0 for line in single.metrics)
    assert any(line["kl"] > 1e-6 for line in single.metrics)
    assert any(line["ratio_max"] > 1.0001 for line in single.metrics)
    assert any(name.startswith("reference.") for name in single.tensors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_the_run_of_one_process(pool, data, single, tmp_path, name: str) -> None:
    world_size, parallel = LAYOUTS[name]
    assert_same(job(pool, make_config(data), tmp_path / "run", world_size, **parallel), single)


@pytest.mark.parametrize(("microbatch_size", "pack", "world_size"), [(4, True, 1), (8, False, 1)])
def test_microbatches_and_packing_change_nothing(
    pool, data, single, tmp_path, microbatch_size: int, pack: bool, world_size: int
) -> None:
    config = make_config(data, pack=pack)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatch_size=microbatch_size))
    assert_same(job(pool, config, tmp_path / "run", world_size, tp=world_size), single)


VARIANT: dict[str, Any] = dict(
    old_log_probs="rollout",
    overlong="mask",
    dynamic_sampling=2,
    loss=LossOptions(kl_coefficient=0.05, aggregation="token", correction="truncate"),
    reward=RewardConfig(names=[NAMES[1]], correct=NAMES[1]),
)


@pytest.fixture(scope="module")
def variant(pool, data, tmp_path_factory) -> Result:
    return job(pool, make_config(data, **VARIANT), tmp_path_factory.mktemp("variant") / "run")


def test_the_other_settings_do_not_depend_on_the_layout_either(pool, data, variant, tmp_path) -> None:
    found = job(pool, make_config(data, **VARIANT, pack=True), tmp_path / "run", 4, tp=2, ep=2)
    assert_same(found, variant)


def test_dynamic_sampling_replaces_flat_groups_by_prompts_of_seed_and_place_alone(
    pool, data, variant, tmp_path
) -> None:
    settings = VARIANT | dict(dynamic_sampling=0, eval_prompts=None)
    config = make_config(data, **settings)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=2))
    without = job(pool, config, tmp_path / "run")
    assert without.metrics[0]["flat_groups"] > variant.metrics[0]["flat_groups"]
    prompts, replaced = read_prompts([data / "six.jsonl"]), 0
    for place in range(4):
        before = [line for line in without.completions if line["prompt_index"] == place]
        after = [line for line in variant.completions[:16] if line["prompt_index"] == place]
        if len({line["reward"] for line in before}) > 1:
            assert before == after
            continue
        replaced += 1
        # the same prompt would have the same completions: random numbers are a function of seed and place, too
        assert after[0]["prompt"] in {
            prompts[prompt_index(config.train.seed, attempt * ROUND + place, len(prompts))].prompt for attempt in (1, 2)
        }
    assert replaced > 0


def test_masked_completions_count_for_their_group_but_not_in_the_loss(pool, data, variant, tmp_path) -> None:
    config = make_config(data, **(VARIANT | dict(overlong="keep", eval_prompts=None)))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=2))
    kept = job(pool, config, tmp_path / "run")
    first = variant.completions[:16]
    assert 0 < sum(line["finished"] for line in first) < 16
    assert kept.completions == first  # advantages, too
    assert kept.metrics[0]["tokens"] == variant.metrics[0]["tokens"]
    assert kept.metrics[0]["grad_norm"] != pytest.approx(variant.metrics[0]["grad_norm"], rel=1e-3)


def test_on_policy_replay_changes_nothing_where_the_rollout_was_not_perturbed(pool, data, tmp_path) -> None:
    found = {}
    for replay in (True, False):
        config = make_config(data, routing_replay=replay, minibatches=1, eval_prompts=None)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=2))
        found[replay] = job(pool, config, tmp_path / str(replay))
    agreement = {name for line in found[True].metrics for name in line if name.startswith("routing_agreement/")}
    assert len(agreement) == 3 and all(line[name] == 1.0 for line in found[True].metrics for name in agreement)
    without = [{name: line[name] for name in line if name not in agreement} for line in found[True].metrics]
    assert_same(found[False], dataclasses.replace(found[True], metrics=without))


def test_the_smallest_run_is_the_same_too_and_ranks_without_prompts_take_part(pool, data, tmp_path) -> None:
    """Prompts of one token, completions of one token, groups as large as a batch, one prompt to evaluate on."""
    files = dict(prompts=str(data / "short.jsonl"), eval_prompts=str(data / "one.jsonl"))
    config = make_config(data, **files, max_prompt_tokens=1, max_new_tokens=1, group_size=8)
    single = job(pool, config, tmp_path / "single")
    assert all(line["num_tokens"] == 1 for line in single.completions) and len(single.completions) == 48
    assert_same(job(pool, config, tmp_path / "tp2_ep4", 4, tp=2, ep=4), single)
    assert_same(job(pool, config, tmp_path / "pp2_dp2", 4, pp=2), single)


def test_rewards_that_always_fail_are_counted_and_said_and_nothing_is_learnt(pool, data, tmp_path) -> None:
    broken = f"{REWARDS}:always_broken"
    settings = dict(eval_prompts=None, reward=RewardConfig(names=[broken], correct=broken), dynamic_sampling=1)
    found = job(pool, make_config(data, **settings, loss=LossOptions(kl_coefficient=0.0)), tmp_path / "run")
    assert all(line[f"reward_failures/{broken}"] == 16 and line["flat_groups"] == 1 for line in found.metrics)
    assert all(line["grad_norm"] == 0 and line["reward"] == 0 for line in found.metrics)
    assert all(line["failures"] == {broken: "raised: no reward today"} for line in found.completions)
    assert not any(name.startswith("reference.") for name in found.tensors)


PERTURBED = {"one": (1, {}), "pp2_zbv": (2, dict(pp=2, schedule="zbv"))}
PERTURBED["pp2_dualpipe_recompute"] = (2, dict(pp=2, schedule="dualpipe", recompute=True))


@pytest.fixture(scope="module")
def perturbed(pool, data, tmp_path_factory):
    def make(name: str, **rl: Any) -> tuple[Result, list[Seen]]:
        world_size, parallel = PERTURBED[name]
        folder = tmp_path_factory.mktemp(name) / "run"
        config = make_config(data, eval_prompts=None, **rl)
        seen = pool.run(run, world_size, in_folder(config, folder, parallel=parallel), 0.3)
        return result(folder), seen

    return functools.cache(make)


def loads_of_rollouts(seen: list[Seen]) -> list[dict[str, list[int]]]:
    """What the routers have counted in the two updates of each rollout, over the ranks."""
    found: list[dict[str, list[int]]] = []
    for first in range(0, 6, 2):
        steps = [{n: load for each in seen for n, load in each.loads[first + i].items() if any(load)} for i in (0, 1)]
        found.append({name: [a + b for a, b in zip(steps[0][name], steps[1][name], strict=True)] for name in steps[0]})
    return found


@pytest.mark.parametrize("name", PERTURBED)
def test_training_uses_the_experts_of_a_perturbed_rollout_and_routers_learn(perturbed, name: str) -> None:
    found, seen = perturbed(name)
    agreements = [v for line in found.metrics for n, v in line.items() if n.startswith("routing_agreement/")]
    assert len(agreements) == 9 and all(0 < value < 1 for value in agreements)
    recorded = [{n: c for each in seen for n, c in each.recorded[i].items()} for i in range(3)]
    assert loads_of_rollouts(seen) == recorded and len(recorded[0]) == 3
    gradients = [{n: g for each in seen for n, g in each.router_gradients[i].items()} for i in range(6)]
    names = {f"layers.{layer}.mlp.gate.weight" for layer in (1, 2, 3)}
    assert all(names <= step.keys() and min(step[n] for n in names) > 1e-9 for step in gradients)
    assert_same(found, perturbed("one")[0])


def test_without_replay_the_live_router_decides(perturbed) -> None:
    _, seen = perturbed("one", routing_replay=False)
    _, replayed = perturbed("one")
    assert loads_of_rollouts(seen)[0] != replayed[0].recorded[0]


def _without_a_layer(completion: Completion) -> None:
    del completion.experts[2]


def _with_another_layer(completion: Completion) -> None:
    completion.experts[0] = completion.experts[2]


def _without_a_token(completion: Completion) -> None:
    completion.experts[2][-1] = -1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_a_layer, r"recorded expert choices of layers \[1, 3\], not of \[1, 2, 3\]"),
        (_with_another_layer, r"recorded expert choices of layers \[0, 1, 2, 3\], not of \[1, 2, 3\]"),
        (_without_a_token, r"layer 2: expert choices of (\d+) tokens were recorded, not of (?!\1)"),
    ],
)
def test_a_record_that_is_missing_or_left_over_is_an_error(pool, data, tmp_path, spoil, message: str) -> None:
    config = in_folder(make_config(data, eval_prompts=None), tmp_path / "run")
    with pytest.raises(PoolError, match=message):
        pool.run(run, 1, config, 0.0, False, spoil)
