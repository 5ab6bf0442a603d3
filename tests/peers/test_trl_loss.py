"""The objective, its gradient and the advantages against TRL's own code (GRPOTrainer), float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1mega.rl import AdvantageOptions, LossOptions, group_advantages, grpo_loss, mean_metrics
from r1mega.rl.loss import correction_weights, kl_estimate, sequence_log_ratios, token_weights
from tests.peers.trl_oracle import Rollout, loss_and_gradient, make_rollout, make_trainer, prepare

TRL_ADVANTAGES = AdvantageOptions(std_divisor="n-1", epsilon=1e-4)
PLAIN = LossOptions(kl_coefficient=0)


def trl(rollout: Rollout, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    trainer = make_trainer(**settings)
    return loss_and_gradient(trainer, prepare(trainer, rollout), rollout)


def ours(
    rollout: Rollout, options: LossOptions, advantages: AdvantageOptions = TRL_ADVANTAGES, **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    current = rollout.current.clone().requires_grad_()
    entropy = rollout.entropy.clone().requires_grad_()
    found = group_advantages(rollout.rewards.view(-1, rollout.group), advantages).advantages.flatten()
    loss, _ = grpo_loss(
        current, rollout.old, rollout.ref, found, rollout.mask, options,
        entropy=entropy, rollout_log_probs=rollout.sampled, **more,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, [current, entropy], allow_unused=True, materialize_grads=True)
    return loss.detach(), gradients[0], gradients[1]


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


AGGREGATIONS = {
    "grpo": replace(PLAIN, aggregation="sequence"),
    "bnpo": replace(PLAIN, aggregation="token"),
    "dapo": replace(PLAIN, aggregation="token"),
    "dr_grpo": replace(PLAIN, aggregation="constant", constant=11),
    "luspo": replace(PLAIN, aggregation="constant", constant=1),
}
POLICIES = {
    "clip": ({}, {}),
    "clip-higher": ({"epsilon_high": 0.28}, {"clip_high": 0.28}),
    "r1": ({"epsilon_low": 10, "epsilon_high": 10}, {"clip_low": 10, "clip_high": 10}),
    "two-sided": ({"delta": 1.5}, {"ratio_bound": 1.5}),
    "kl": ({"beta": 0.3}, {"kl_coefficient": 0.3}),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_objective_and_gradient_equal_trl_for_each_aggregation_ratio_and_clip(loss_type, level, policy):
    rollout, (settings, changes) = make_rollout(), POLICIES[policy]
    expected = trl(rollout, loss_type=loss_type, importance_sampling_level=level, **settings)
    options = replace(AGGREGATIONS[loss_type], ratio=level)
    assert_same(ours(rollout, replace(options, **changes)), expected)
    assert not changes or (ours(rollout, options)[0] - expected[0]).abs() > 1e-4, "the case must not be empty"


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [1.1, 5.0])
def test_cispo_equals_trl_whose_epsilon_high_is_one_plus_ours(cap, level):
    rollout = make_rollout()
    expected = trl(rollout, loss_type="cispo", epsilon_high=cap, importance_sampling_level=level, beta=0.1)
    options = LossOptions(
        cispo=True, clip_low=1, clip_high=cap - 1, aggregation="token", ratio=level, kl_coefficient=0.1
    )
    assert_same(ours(rollout, options), expected)
    if cap < 2:
        other = ours(rollout, replace(options, clip_high=cap))
        assert_same(
            other, trl(rollout, loss_type="cispo", epsilon_high=1 + cap, importance_sampling_level=level, beta=0.1)
        )
        assert not torch.allclose(other[1], expected[1])


def test_unbiased_kl_equals_trl_with_token_ratios():
    rollout = make_rollout()
    expected = trl(rollout, beta=0.3, use_bias_correction_kl=True)
    assert_same(ours(rollout, replace(PLAIN, kl_coefficient=0.3, kl_unbiased=True)), expected)


@pytest.mark.parametrize("low", [None, 0.8])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_off_policy_correction_equals_trl(level, kind, low):
    rollout = make_rollout()
    settings = {"use_vllm": True, "vllm_importance_sampling_mode": f"{level}_{kind}"}
    settings |= {"vllm_importance_sampling_clip_max": 1.3, "vllm_importance_sampling_clip_min": low, "beta": 0.1}
    options = LossOptions(
        correction=kind, correction_level=level, correction_high=1.3, correction_low=low or 0, kl_coefficient=0.1
    )
    weights = correction_weights(rollout.old, rollout.sampled, rollout.mask, options)[rollout.mask]
    assert (weights == (0 if kind == "mask" else 1.3)).any() and ((weights > 0) & (weights < 1.3)).any()
    assert_same(ours(rollout, options), trl(rollout, **settings))


def test_sequence_ratio_with_sequence_correction_equals_trl():
    rollout = make_rollout()
    settings = {"use_vllm": True, "vllm_importance_sampling_mode": "sequence_truncate"}
    options = replace(PLAIN, ratio="sequence", correction="truncate", correction_level="sequence")
    assert_same(ours(rollout, options), trl(rollout, importance_sampling_level="sequence", **settings))


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_entropy_bonus_equals_trl_where_the_aggregation_is_per_token(loss_type):
    rollout = make_rollout()
    options = replace(AGGREGATIONS[loss_type], entropy_coefficient=0.2)
    assert_same(ours(rollout, options), trl(rollout, loss_type=loss_type, entropy_coef=0.2))


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_equal_trl(scale):
    rollout = make_rollout()
    trainer = make_trainer(scale_rewards=scale)
    expected = prepare(trainer, rollout)["advantages"]
    options = replace(TRL_ADVANTAGES, divide_by_std=scale == "group")
    found = group_advantages(rollout.rewards.view(-1, rollout.group), options)
    torch.testing.assert_close(found.advantages.flatten(), expected, rtol=1e-12, atol=1e-12)
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [found.flat.float().mean().item()]


def test_a_completion_without_a_token_counts_in_the_mean_as_in_trl():
    rollout = make_rollout()
    trainer = make_trainer()
    inputs = prepare(trainer, rollout)
    inputs["completion_mask"] = inputs["completion_mask"].clone()
    inputs["completion_mask"][2] = 0
    rollout.mask[2] = False
    assert_same(ours(rollout, PLAIN), loss_and_gradient(trainer, inputs, rollout))


def test_metrics_equal_trl():
    rollout = make_rollout()
    trainer = make_trainer(beta=0.1)
    loss_and_gradient(trainer, prepare(trainer, rollout), rollout)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    found = group_advantages(rollout.rewards.view(-1, rollout.group), TRL_ADVANTAGES).advantages.flatten()
    arguments = (rollout.current, rollout.old, rollout.ref, found, rollout.mask, LossOptions())
    metrics = mean_metrics(grpo_loss(*arguments, entropy=rollout.entropy)[1])
    names = {"clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean", "kl": "kl", "entropy": "entropy"}
    for name, other in names.items():
        assert metrics[name] == pytest.approx(logged[other], rel=1e-6), name
        assert metrics[name] > 0


# Where the semantics differ: the difference is the one that the docstring of LossOptions names, and no other.


def test_trl_differs_by_its_divisor_of_the_standard_deviation():
    """n - 1 in TRL: with n, as in the paper, its advantages are sqrt((G - 1) / G) of ours (its 1e-4 aside)."""
    rollout = make_rollout()
    group = rollout.group
    paper = AdvantageOptions(std_divisor="n", epsilon=1e-4 * ((group - 1) / group) ** 0.5)
    loss, gradient, _ = ours(rollout, PLAIN, advantages=paper)
    expected, expected_gradient, _ = trl(rollout)
    factor = ((group - 1) / group) ** 0.5
    assert_same((loss * factor, gradient * factor), (expected, expected_gradient))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_trl_differs_in_the_aggregation_of_the_entropy_bonus(loss_type):
    """TRL: the mean over all tokens; here: as the rest is aggregated."""
    rollout, options = make_rollout(), replace(AGGREGATIONS[loss_type], entropy_coefficient=0.2)
    found, expected = ours(rollout, options), trl(rollout, loss_type=loss_type, entropy_coef=0.2)
    ours_H = (token_weights(rollout.mask, options, dtype=torch.float64) * rollout.entropy).sum()
    trl_H = rollout.entropy[rollout.mask].mean()
    assert (ours_H - trl_H).abs() > 1e-2
    assert_same((found[0] + 0.2 * ours_H, found[1]), (expected[0] + 0.2 * trl_H, expected[1]))


def test_trl_bnpo_depends_on_the_microbatches_and_ours_does_not():
    """TRL's ``bnpo`` over two microbatches is the mean of their means; ours is the global mean, as its ``dapo``."""
    rollout = make_rollout()
    cut = 2 * rollout.group
    halves = [
        replace(rollout, **{name: getattr(rollout, name)[rows] for name in vars(rollout) if name != "group"})
        for rows in (slice(0, cut), slice(cut, None))
    ]
    options = AGGREGATIONS["bnpo"]
    whole = ours(rollout, options)
    parts = [ours(half, options, normalizer=rollout.mask.sum()) for half in halves]
    assert_same((parts[0][0] + parts[1][0], torch.cat([parts[0][1], parts[1][1]])), whole[:2])
    theirs = [trl(half, loss_type="bnpo", current_gradient_accumulation_steps=2) for half in halves]
    assert (theirs[0][0] + theirs[1][0] - whole[0]).abs() > 1e-4
    counts = [int(half.mask.sum()) for half in halves]
    shares = [2 * count / sum(counts) for count in counts]
    assert_same((theirs[0][0] * shares[0] + theirs[1][0] * shares[1],), whole[:1])


def _of_sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """What TRL makes of a multiplier that differs by token: each token's gradient has the sequence's mean of it."""
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def test_trl_differs_in_the_gradient_of_sequence_ratios_with_token_corrections():
    """TRL's goes through the mean log-ratio, so that a token has the mean of its sequence's corrections."""
    rollout = make_rollout()
    options = replace(PLAIN, ratio="sequence", correction="truncate")
    found = ours(rollout, options)
    settings = {"use_vllm": True, "importance_sampling_level": "sequence"}
    expected = trl(rollout, **settings)
    assert_same(found[:1], expected[:1])
    assert not torch.allclose(found[1], expected[1])
    correction = correction_weights(rollout.old, rollout.sampled, rollout.mask, options)
    factor = _of_sequence_mean(correction, rollout.mask) / correction
    assert_same((found[1] * factor,), (expected[1],))


def test_trl_differs_in_the_gradient_of_the_unbiased_kl_with_sequence_ratios():
    """The same: the part of the gradient that goes through the ratio has the sequence's mean of the KL estimates."""
    rollout = make_rollout()
    options = replace(PLAIN, ratio="sequence", kl_coefficient=0.3, kl_unbiased=True)
    found = ours(rollout, options)
    expected = trl(rollout, importance_sampling_level="sequence", beta=0.3, use_bias_correction_kl=True)
    assert_same(found[:1], expected[:1])
    kl = kl_estimate(rollout.current, rollout.ref)
    ratios = sequence_log_ratios(rollout.current, rollout.old, rollout.mask).exp()
    weights = token_weights(rollout.mask, options, dtype=torch.float64)
    difference = weights * 0.3 * ratios * (_of_sequence_mean(kl, rollout.mask) - kl)
    assert difference.abs().max() > 1e-4
    assert_same((found[1] + difference,), (expected[1],))


def test_trl_has_no_lower_bound_in_cispo():
    """With ours the ratios below ``1 - clip_low`` are raised to it; TRL leaves them, and nothing else differs."""
    rollout = make_rollout()
    options = LossOptions(cispo=True, clip_low=0.2, clip_high=4, aggregation="token", kl_coefficient=0)
    found, expected = ours(rollout, options)[1], trl(rollout, loss_type="cispo", epsilon_high=5)[1]
    ratios = (rollout.current - rollout.old).exp()
    low = ratios < 0.8
    assert (low & rollout.mask & (expected != 0)).any()
    assert_same((found[~low],), (expected[~low],))
    assert_same((found[low],), ((expected * 0.8 / ratios)[low],))
