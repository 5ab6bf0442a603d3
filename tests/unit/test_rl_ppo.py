"""PPO's advantages and value loss, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1mega.rl.loss import LossOptions, grpo_loss
from r1mega.rl.ppo import PPOOptions, gae, moments, ppo_loss, token_rewards, value_losses, whiten
from tests.unit.rl_cases import make_inputs

OPTIONS = PPOOptions(discount=0.9, trace=0.8)


def make_values(seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("rewards", "values", "old_values", "returns")
    return {name: torch.randn(6, 8, generator=generator, dtype=torch.float64) for name in names}


def by_definition(rewards: Tensor, values: Tensor, mask: Tensor, options: PPOOptions, last: Tensor) -> Tensor:
    """Equation 16 as a sum over the tokens that count."""
    found = torch.zeros_like(values)
    for b in range(len(mask)):
        steps = mask[b].nonzero().flatten().tolist()
        ahead = [*(values[b, t].item() for t in steps[1:]), last[b].item()][: len(steps)]
        deltas = [
            rewards[b, t].item() + options.discount * following - values[b, t].item()
            for t, following in zip(steps, ahead, strict=True)
        ]
        for i, t in enumerate(steps):
            found[b, t] = sum((options.discount * options.trace) ** k * delta for k, delta in enumerate(deltas[i:]))
    return found


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_advantages_are_the_sum_over_the_tokens_that_count(bootstrap):
    given, mask = make_values(), make_inputs()["mask"]
    last = torch.linspace(-1, 1, 6, dtype=torch.float64) * bootstrap
    found, returns = gae(given["rewards"], given["values"], mask, OPTIONS, last_values=last if bootstrap else None)
    assert_equal(found, by_definition(given["rewards"], given["values"], mask, OPTIONS, last))
    assert_equal(returns, (found + given["values"]) * mask)


def test_trace_of_one_is_the_return_and_of_zero_one_step_ahead():
    given, mask = make_values(), torch.ones(6, 8, dtype=torch.bool)
    rewards, values = given["rewards"], given["values"]
    _, returns = gae(rewards, values, mask, PPOOptions(trace=1))
    assert_equal(returns, rewards.flip(1).cumsum(1).flip(1))
    found, _ = gae(rewards, values, mask, PPOOptions(trace=0))
    assert_equal(found, rewards + torch.nn.functional.pad(values[:, 1:], (0, 1)) - values)


def test_padding_and_packing_do_not_change_the_advantages():
    given, mask = make_values(), make_inputs()["mask"]
    rewards, values = given["rewards"], given["values"]
    expected, _ = gae(rewards, values, mask, OPTIONS)
    padded = [torch.nn.functional.pad(value, (3, 2), value=float("nan")) for value in (rewards, values)]
    found, _ = gae(*padded, torch.nn.functional.pad(mask, (3, 2)), OPTIONS)
    assert_equal(found[:, 3:-2], expected)
    rows = torch.arange(6)[:, None].expand(6, 8).reshape(2, 24)
    packed = (value.reshape(2, 24) for value in (rewards, values, mask))
    assert_equal(gae(*packed, OPTIONS, sequences=rows)[0].reshape(6, 8), expected)
    with pytest.raises(ValueError, match="last_values: not with packed rows"):
        gae(rewards, values, mask, last_values=values[:, 0], sequences=mask.long())


def test_the_reward_comes_with_the_last_token_and_kl_with_each():
    mask = torch.tensor([[False, True, True, False], [False] * 4])
    old, ref = torch.full((2, 4), -1.0), torch.full((2, 4), -3.0)
    rewards = torch.tensor([5.0, 7.0])
    assert token_rewards(rewards, mask).tolist() == [[0, 0, 5, 0], [0] * 4]
    found = token_rewards(rewards, mask, old, ref, PPOOptions(reward_kl_coefficient=0.25))
    assert found.tolist() == [[0, -0.5, 4.5, 0], [0] * 4]


def test_whitening_is_of_the_global_batch():
    given, mask = make_values()["values"] * 3 + 2, make_inputs()["mask"]
    found = whiten(given, mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert found[mask].var().item() == pytest.approx(1)
    assert (found[~mask] == 0).all()
    of_all = moments(given[:2], mask[:2]) + moments(given[2:], mask[2:])
    assert_equal(torch.cat([whiten(given[:2], mask[:2], of_all), whiten(given[2:], mask[2:], of_all)]), found)


@pytest.mark.parametrize(
    ("value", "loss", "gradient"), [(1.1, 0.5 * 1.9**2, -1.9), (1.5, 0.5 * 1.8**2, 0), (0.5, 0.5 * 2.5**2, -2.5)]
)
def test_value_loss_is_clipped_where_the_value_runs_ahead(value, loss, gradient):
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.ones(1, dtype=torch.float64), torch.full((1,), 3.0, dtype=torch.float64)
    found = value_losses(values, old, returns)
    assert found.item() == pytest.approx(loss)
    assert torch.autograd.grad(found, values)[0].item() == pytest.approx(gradient)
    assert value_losses(values, old, returns, PPOOptions(value_clip=None)).item() == pytest.approx((value - 3) ** 2 / 2)


def run(inputs: dict[str, Tensor], **more: float) -> tuple[Tensor, ...]:
    log_probs, values = (inputs[name].clone().requires_grad_() for name in ("log_probs", "values"))
    names = ("old_log_probs", "advantages", "mask")
    others = (inputs[name] for name in ("old_values", "returns"))
    loss, metrics = ppo_loss(log_probs, *(inputs[name] for name in names), values, *others, ppo=OPTIONS, **more)
    gradients = torch.autograd.grad(loss, [log_probs, values])
    return loss.detach(), *gradients, torch.stack([metrics["value_loss"], metrics["value_clip"]])


def make_ppo_inputs() -> dict[str, Tensor]:
    inputs = make_inputs() | make_values()
    inputs["advantages"] = make_values(4)["rewards"]
    return inputs


def test_ppo_is_the_shared_policy_loss_plus_the_value_loss():
    inputs = make_ppo_inputs()
    mask = inputs["mask"]
    loss, gradient, value_gradient, sums = run(inputs)
    log_probs = inputs["log_probs"].requires_grad_()
    options = LossOptions(aggregation="token", kl_coefficient=0)
    policy, _ = grpo_loss(log_probs, inputs["old_log_probs"], None, inputs["advantages"], mask, options)
    losses = value_losses(inputs["values"], inputs["old_values"], inputs["returns"], OPTIONS)[mask]
    assert_equal(loss, policy.detach() + 0.1 * losses.mean())
    assert_equal(gradient, torch.autograd.grad(policy, log_probs)[0])
    assert sums[0].item() == pytest.approx(losses.sum().item())
    still = (value_gradient[mask] == 0).sum().item()
    assert sums[1].item() == still > 0


def test_ppo_microbatches_add_up_and_padding_has_no_part():
    inputs = make_ppo_inputs()
    whole = run(inputs)
    mask = inputs["mask"]
    dirty = {n: v.masked_fill(~mask, float("nan")) if v.is_floating_point() else v for n, v in inputs.items()}
    parts = [run({name: value[rows] for name, value in dirty.items()}, normalizer=int(mask.sum()))
             for rows in (slice(0, 2), slice(2, 6))]  # fmt: skip
    for found, expected, join in zip(zip(*parts, strict=True), whole, (sum, torch.cat, torch.cat, sum), strict=True):
        assert_equal(join(found), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discount": 1.1}, "discount=1.1: must be from 0 to 1"),
        ({"trace": -0.1}, "trace=-0.1: must be from 0 to 1"),
        ({"value_clip": -1}, "value_clip=-1: must be at least 0"),
        ({"value_coefficient": float("nan")}, "value_coefficient=nan: must be at least 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOOptions(**settings)
