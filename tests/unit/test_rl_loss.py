"""The objective: what it is, that it does not depend on how a batch is cut, and that each option does what it says."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from r1mega.rl import LossOptions, grpo_loss, mean_metrics, merge_metrics
from r1mega.rl.loss import (
    TokenObjective,
    correction_weights,
    kl_estimate,
    sequence_log_ratios,
    token_losses,
    token_weights,
)
from tests.unit.rl_cases import VARIANTS, make_inputs, plain_loss

KEYS = ("old_log_probs", "ref_log_probs", "advantages", "mask")


def run(options: LossOptions, inputs: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, its gradient in the log-probabilities, metrics."""
    log_probs = inputs["log_probs"].clone().requires_grad_()
    others = {name: inputs[name] for name in ("entropy", "rollout_log_probs")}
    loss, metrics = grpo_loss(log_probs, *(inputs[name] for name in KEYS), options, **others, **more)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0], metrics


def normalizer(options: LossOptions, inputs: dict[str, Tensor]) -> int:
    return int(inputs["mask"].sum()) if options.aggregation == "token" else inputs["mask"].shape[0]


def assert_equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.fixture(params=VARIANTS)
def options(request) -> LossOptions:
    return VARIANTS[request.param]


# The objective does not depend on how the batch is cut


def test_loss_is_what_the_docstring_states(options):
    inputs = make_inputs()
    assert run(options, inputs)[0].item() == pytest.approx(plain_loss(options, inputs), rel=1e-12)


def test_microbatches_add_up_to_the_batch_in_loss_gradient_and_metrics(options):
    inputs = make_inputs()
    loss, gradient, metrics = run(options, inputs)
    parts = [
        run(options, {name: value[rows] for name, value in inputs.items()}, normalizer=normalizer(options, inputs))
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert_equal(sum(part[0] for part in parts), loss)
    assert_equal(torch.cat([part[1] for part in parts]), gradient)
    assert_equal(merge_metrics(part[2] for part in parts), metrics)


def test_padding_changes_nothing_whatever_stands_in_it(options):
    inputs = make_inputs()
    loss, gradient, metrics = run(options, inputs)
    padded = {}
    for name, value in inputs.items():
        bad = {"log_probs": -math.inf, "old_log_probs": math.nan}.get(name, math.inf)
        fill = False if value.dtype == torch.bool else bad
        if value.dim() == 2:
            value = value.masked_fill(~inputs["mask"], fill) if value.dtype != torch.bool else value
            value = torch.nn.functional.pad(value, (2, 5), value=fill)
        padded[name] = value
    found = run(options, padded)
    assert_equal(found[0], loss)
    assert_equal(found[1], torch.nn.functional.pad(gradient, (2, 5)))
    assert_equal(found[2], metrics)


def test_packing_changes_nothing(options):
    inputs = make_inputs()
    loss, gradient, metrics = run(options, inputs)
    rows = torch.arange(6)[:, None].expand(6, 8)
    wide = inputs | {"advantages": inputs["advantages"][:, None].expand(6, 8)}
    # Two rows, in each of which three sequences lie one behind the other, in another order.
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    packed = {name: value[order].reshape(2, 24) for name, value in wide.items()}
    found = run(options, packed, sequences=rows[order].reshape(2, 24), normalizer=normalizer(options, inputs))
    assert_equal(found[0], loss)
    assert_equal(found[1].reshape(6, 8), gradient[order])
    assert_equal(found[2], metrics)


def test_chunks_of_rows_give_the_same_loss_and_gradient(options):
    """What a fused head calls: flat tokens in chunks, those with mask False left out."""
    inputs = make_inputs()
    loss, gradient, _ = run(options, inputs)
    old, mask, wide = inputs["old_log_probs"], inputs["mask"], inputs["advantages"][:, None].expand(6, 8)
    objective = TokenObjective(
        options,
        wide,
        token_weights(mask, options, dtype=torch.float64),
        old,
        inputs["ref_log_probs"],
        None if options.correction == "none" else correction_weights(old, inputs["rollout_log_probs"], mask, options),
        sequence_log_ratios(inputs["log_probs"], old, mask) if options.ratio == "sequence" else None,
    )
    total, found = torch.zeros((), dtype=torch.float64), torch.zeros(48, dtype=torch.float64)
    for rows in mask.flatten().nonzero().flatten().split(7):
        chunk = inputs["log_probs"].flatten()[rows].requires_grad_()
        losses = objective(chunk, inputs["entropy"].flatten()[rows], rows)
        total += losses.sum().detach()
        found[rows] = torch.autograd.grad(losses.sum(), chunk)[0]
    assert_equal(total, loss)
    assert_equal(found.view(6, 8), gradient)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "cispo"])
def test_gradient_is_the_derivative(name):
    """Not so in CISPO, by its definition."""
    options = VARIANTS[name]
    inputs = make_inputs(rows=3, length=4)

    def loss(log_probs: Tensor, entropy: Tensor) -> Tensor:
        rollout = inputs["rollout_log_probs"]
        return grpo_loss(
            log_probs, *(inputs[name] for name in KEYS), options, entropy=entropy, rollout_log_probs=rollout
        )[0]

    arguments = (inputs["log_probs"].requires_grad_(), inputs["entropy"].requires_grad_())
    if options.entropy_coefficient == 0:
        arguments = (arguments[0], arguments[1].detach())
    assert torch.autograd.gradcheck(loss, arguments)


def test_half_precision_is_computed_in_float32():
    inputs = make_inputs()
    low = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    loss, gradient, _ = run(LossOptions(), low)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    exact, _, _ = run(LossOptions(), {n: v.double() if v.is_floating_point() else v for n, v in low.items()})
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)


def test_weights_add_up_to_one_whatever_the_aggregation_is():
    mask = make_inputs()["mask"]
    filled = mask.any(dim=1).double().mean().item()
    assert token_weights(mask, LossOptions()).sum().item() == pytest.approx(filled)
    assert token_weights(mask, LossOptions(aggregation="token")).sum().item() == pytest.approx(1)
    constant = token_weights(mask, LossOptions(aggregation="constant", constant=10))
    assert constant.sum().item() == pytest.approx(mask.sum().item() / 10 / 6)


def test_constant_aggregation_is_verls_sum_over_sequences_divided_by_their_number():
    inputs = make_inputs()
    options = LossOptions(aggregation="constant", constant=9, kl_coefficient=0)
    ratios, wide = (inputs["log_probs"] - inputs["old_log_probs"]).exp(), inputs["advantages"][:, None]
    losses = torch.maximum(-ratios * wide, -ratios.clamp(0.8, 1.2) * wide)
    of_verl = (losses * inputs["mask"]).sum(dim=-1).sum() / 9
    assert_equal(run(options, inputs)[0], of_verl / 6)


# Ratios and clipping


def one_token(ratio: float, advantage: float, options: LossOptions) -> tuple[float, float]:
    """Loss and gradient of a single token."""
    log_probs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64)
    loss = token_losses(log_probs, old, None, torch.tensor([advantage], dtype=torch.float64), options)
    return loss.item(), torch.autograd.grad(loss, log_probs)[0].item()


PPO = LossOptions(kl_coefficient=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (5.0, -2.0, 10.0, 10.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip_takes_the_gradient_where_it_would_move_the_ratio_further_out(ratio, advantage, loss, gradient):
    found = one_token(ratio, advantage, PPO)
    assert found == (pytest.approx(loss), pytest.approx(gradient))
    if gradient == 0:
        assert found[1] == 0, "exactly zero, so that a head can leave the row out"


def test_ratio_bound_takes_the_gradient_of_negative_advantages_alone():
    options = replace(PPO, ratio_bound=3)
    assert one_token(5.0, -2.0, options) == (pytest.approx(6.0), 0.0)
    assert one_token(2.9, -2.0, options) == (pytest.approx(5.8), pytest.approx(5.8))
    assert one_token(5.0, 2.0, options) == one_token(5.0, 2.0, PPO)


def test_r1_clip_of_ten_is_not_defeated_by_a_dual_clip_of_three():
    r1 = replace(PPO, clip_low=10, clip_high=10)
    assert one_token(5.0, -1.0, r1)[1] == pytest.approx(5.0)
    assert one_token(10.9, 1.0, r1)[1] == pytest.approx(-10.9)
    assert one_token(11.1, 1.0, r1)[1] == 0
    with pytest.raises(ValueError, match=r"ratio_bound=3: must be over 1 \+ clip_high \(11\)"):
        replace(r1, ratio_bound=3)


def test_cispo_clips_to_one_plus_epsilon_and_keeps_the_gradient():
    options = LossOptions(cispo=True, clip_low=0.2, clip_high=4, kl_coefficient=0)
    assert one_token(7.0, 2.0, options) == (pytest.approx(5 * 2.0), pytest.approx(-5 * 2.0))
    assert one_token(0.1, 2.0, options) == (pytest.approx(0.8 * 2.0), pytest.approx(-0.8 * 2.0))
    assert one_token(3.0, -2.0, options)[1] == pytest.approx(3 * 2.0)


def test_without_old_log_probs_the_ratio_is_one():
    for ratio in ("token", "sequence"):
        options = LossOptions(ratio=ratio)
        inputs = make_inputs()
        found = run(options, inputs | {"old_log_probs": None})
        expected = run(options, inputs | {"old_log_probs": inputs["log_probs"]})
        assert_equal(found, expected)
        assert mean_metrics(found[2])["ratio_max"] == 1


def test_sequence_ratio_is_the_geometric_mean_and_its_gradient_that_of_the_mean():
    inputs = make_inputs()
    mask, options = inputs["mask"], LossOptions(ratio="sequence", clip_low=5, clip_high=5, kl_coefficient=0)
    log_probs = inputs["log_probs"].clone().requires_grad_()
    mean = ((log_probs - inputs["old_log_probs"]) * mask).sum(1) / mask.sum(1).clamp(min=1)
    expected = -(mean.exp() * inputs["advantages"] * mask.any(1)).mean()
    loss, gradient, _ = run(options, inputs)
    assert_equal((loss, gradient), (expected.detach(), torch.autograd.grad(expected, log_probs)[0]))


def test_sequence_ratio_gives_each_token_its_own_advantage():
    """The "GSPO-token" form: with advantages by token, each token's gradient has its own."""
    inputs = make_inputs()
    options = LossOptions(ratio="sequence", clip_low=5, clip_high=5, kl_coefficient=0)
    by_token = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ratios = sequence_log_ratios(inputs["log_probs"], inputs["old_log_probs"], inputs["mask"]).exp()
    weights = token_weights(inputs["mask"], options, dtype=torch.float64)
    assert_equal(run(options, inputs | {"advantages": by_token})[1], -weights * ratios * by_token)


# KL: exact expectations over a small vocabulary


def expectations(estimator: str, unbiased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of the estimate and of its gradient over tokens of pi_old; the divergence and its gradient."""
    generator = torch.Generator().manual_seed(0)
    logits, ref, old = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    log_probs, ref, old = logits.log_softmax(0), ref.log_softmax(0), old.log_softmax(0)
    old = old if unbiased else log_probs.detach()
    options = LossOptions(kl_coefficient=1, kl_estimator=estimator, kl_unbiased=unbiased)
    estimates = token_losses(log_probs, old, ref, torch.zeros(5, dtype=torch.float64), options)
    mean = (old.exp() * estimates).sum()
    divergence = (log_probs.exp() * (log_probs - ref)).sum()
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (mean, divergence)]
    return mean.detach(), gradients[0], divergence.detach(), gradients[1]


def test_k1_is_unbiased_but_its_gradient_is_zero_in_the_mean():
    value, gradient, divergence, _ = expectations("k1", False)
    assert_equal(value, divergence)
    assert gradient.abs().max() < 1e-14


def test_k2_is_biased_but_its_gradient_is_that_of_the_divergence():
    value, gradient, divergence, right = expectations("k2", False)
    assert (value - divergence).abs() > 1e-2
    assert_equal(gradient, right)


def test_k3_is_unbiased_and_never_negative_but_its_gradient_is_another():
    value, gradient, divergence, right = expectations("k3", False)
    assert_equal(value, divergence)
    assert (gradient - right).abs().max() > 1e-2
    assert (kl_estimate(torch.linspace(-3, 3, 50), torch.zeros(50)) >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_kl_has_the_right_value_and_gradient_off_policy(estimator):
    value, gradient, divergence, right = expectations(estimator, True)
    assert_equal((value, gradient), (divergence, right))


# Entropy and corrections


def test_entropy_bonus_is_of_the_distribution_and_aggregated_like_the_rest():
    """Not -p log p of the sampled token: the log-probabilities have no part in it."""
    inputs = make_inputs()
    for aggregation in ("sequence", "token"):
        with_bonus = LossOptions(kl_coefficient=0, entropy_coefficient=0.5, aggregation=aggregation)
        without = replace(with_bonus, entropy_coefficient=0)
        weights = token_weights(inputs["mask"], without, dtype=torch.float64)
        found, expected = run(with_bonus, inputs), run(without, inputs)
        assert_equal(expected[0] - found[0], 0.5 * (weights * inputs["entropy"]).sum())
        assert_equal(found[1], expected[1])


def test_correction_leaves_kl_entropy_and_weights_alone():
    inputs = make_inputs()
    options = LossOptions(correction="mask", correction_high=1e-9, entropy_coefficient=0.1, kl_coefficient=0.1)
    nothing_left = inputs | {"advantages": torch.zeros(6, dtype=torch.float64)}
    assert_equal(run(options, inputs)[0], run(replace(options, correction="none"), nothing_left)[0])


def test_correction_by_sequence_is_the_product_where_the_sequence_ratio_is_the_mean():
    old, rollout = torch.tensor([[-1.0, -1.0, -9.0]]), torch.tensor([[-1.2, -1.3, 0.0]])
    mask = torch.tensor([[True, True, False]])
    options = LossOptions(correction="truncate", correction_level="sequence", correction_high=9)
    product = correction_weights(old, rollout, mask, options)[0]
    assert product[:2].tolist() == pytest.approx([math.exp(0.5)] * 2)
    mean = sequence_log_ratios(old, rollout, mask)[0].exp()
    assert mean[:2].tolist() == pytest.approx([math.exp(0.25)] * 2)


# Metrics


def test_metrics_count_what_the_options_took():
    inputs = make_inputs()
    options = LossOptions(ratio_bound=1.6, correction="truncate", correction_low=0.7, correction_high=1.4)
    loss, gradient, metrics = run(replace(options, kl_coefficient=0), inputs)
    mask = inputs["mask"]
    ratios = (inputs["log_probs"] - inputs["old_log_probs"]).exp()[mask]
    advantages = inputs["advantages"][:, None].expand(6, 8)[mask]
    quotients = (inputs["old_log_probs"] - inputs["rollout_log_probs"])[mask]
    means = mean_metrics(metrics)
    count = int(mask.sum())
    expected = {
        "num_tokens": count,
        "ratio": ratios.mean(),
        "ratio_max": ratios.max(),
        "clip_low": ((ratios < 0.8) & (advantages < 0)).double().mean(),
        "clip_high": ((ratios > 1.2) & (advantages > 0)).double().mean(),
        "clip_bound": ((ratios > 1.6) & (advantages < 0)).double().mean(),
        "old_kl": -ratios.log().mean(),
        "entropy": inputs["entropy"][mask].mean(),
        "kl": kl_estimate(inputs["log_probs"], inputs["ref_log_probs"])[mask].mean(),
        "correction": quotients.exp().clamp(0.7, 1.4).mean(),
        "correction_cut": ((quotients.exp() > 1.4) | (quotients.exp() < 0.7)).double().mean(),
        "rollout_difference": quotients.abs().mean(),
        "rollout_difference_max": quotients.abs().max(),
    }
    assert means == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-12)
    assert all(value > 0 for name, value in means.items() if name != "old_kl")
    taken = means["clip_low"] + means["clip_high"] + means["clip_bound"]
    assert (gradient[mask] == 0).double().mean().item() == pytest.approx(taken)


def test_metrics_of_masking_count_the_dropped_and_of_cispo_the_clipped():
    inputs, options = make_inputs(), VARIANTS["mask"]
    _, gradient, metrics = run(replace(options, kl_coefficient=0, clip_low=5, clip_high=50), inputs)
    assert metrics["correction_cut"].item() == (gradient[inputs["mask"]] == 0).sum().item() > 0
    ratios = (inputs["log_probs"] - inputs["old_log_probs"]).exp()[inputs["mask"]]
    metrics = run(VARIANTS["cispo"], inputs)[2]
    assert metrics["clip_low"].item() == (ratios < 0.7).sum().item() > 0
    assert metrics["clip_high"].item() == (ratios > 1.5).sum().item() > 0
    assert "clip_bound" not in metrics


def test_metrics_of_sequence_ratios_are_of_those():
    inputs = make_inputs()
    metrics = run(VARIANTS["gspo"], inputs)[2]
    ratios = sequence_log_ratios(inputs["log_probs"], inputs["old_log_probs"], inputs["mask"]).exp()[inputs["mask"]]
    assert_equal((metrics["ratio"], metrics["ratio_max"]), (ratios.sum(), ratios.max()))


def test_an_empty_microbatch_adds_nothing():
    inputs = {name: value[:0] for name, value in make_inputs().items()}
    loss, _, metrics = run(LossOptions(), inputs, normalizer=6)
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert mean_metrics(metrics)["kl"] == 0


# Errors, imports


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": "word"}, "ratio=word: must be one of token, sequence"),
        ({"aggregation": "mean"}, "aggregation=mean: must be one of sequence, token, constant"),
        ({"kl_estimator": "k4"}, "kl_estimator=k4: must be one of k1, k2, k3"),
        ({"correction": "clip"}, "correction=clip: must be one of none, truncate, mask"),
        ({"correction_level": "row"}, "correction_level=row: must be one of token, sequence"),
        ({"clip_low": -0.1}, "clip_low=-0.1: must be at least 0"),
        ({"clip_high": math.nan}, "clip_high=nan: must be at least 0"),
        ({"kl_coefficient": math.inf}, "kl_coefficient=inf: must be finite"),
        ({"entropy_coefficient": math.nan}, "entropy_coefficient=nan: must be finite"),
        ({"aggregation": "constant"}, "constant=None: aggregation=constant needs a number over 0"),
        ({"constant": 5}, "constant=5: is for aggregation=constant alone"),
        ({"ratio_bound": 1.1}, r"ratio_bound=1.1: must be over 1 \+ clip_high \(1.2\)"),
        ({"ratio_bound": 3, "cispo": True}, "ratio_bound=3: has no meaning with cispo"),
        ({"correction_low": 2.0}, "correction_high=2.0: must be over correction_low"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**settings)


@pytest.mark.parametrize(
    ("options", "missing", "message"),
    [
        (LossOptions(), "ref_log_probs", "kl_coefficient=0.001: needs ref_log_probs"),
        (VARIANTS["entropy"], "entropy", "entropy_coefficient=0.2: needs entropy"),
        (VARIANTS["mask"], "rollout_log_probs", "correction=mask: needs rollout_log_probs"),
    ],
)
def test_a_tensor_that_the_options_need_cannot_be_left_out(options, missing, message):
    with pytest.raises(ValueError, match=message):
        run(options, make_inputs() | {missing: None})


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"entropy is \[6, 7\], where mask is \[6, 8\]"):
        run(LossOptions(), make_inputs() | {"entropy": torch.zeros(6, 7)})
    with pytest.raises(ValueError, match="packed rows need normalizer"):
        run(LossOptions(), make_inputs(), sequences=torch.zeros(6, 8, dtype=torch.int64))


def test_imports_are_light():
    code = (
        "import sys; import r1mega.rl, r1mega.rl.options; assert 'torch' not in sys.modules;"
        "from r1mega.rl import grpo_loss; import r1mega.rl.ppo, r1mega.rl.advantages;"
        "print(sorted(name for name in sys.modules if name.startswith('r1mega')))"
    )
    names = ["", ".rl", ".rl.advantages", ".rl.loss", ".rl.loss_metrics", ".rl.options", ".rl.ppo"]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(["r1mega" + name for name in names])


def test_unknown_names_are_no_attributes():
    import r1mega.rl

    assert set(r1mega.rl.__all__) <= set(dir(r1mega.rl))
    assert all(getattr(r1mega.rl, name) for name in r1mega.rl.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'ppo_loss'"):
        _ = r1mega.rl.ppo_loss
