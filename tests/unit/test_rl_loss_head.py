"""The objective from hidden states is that after log_softmax: loss, gradients and metrics, in every variant."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.tensor_watch import TensorWatch
from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import PipelineExecutor, StageOutput
from r1mega.rl import LossOptions, grpo_loss, grpo_loss_from_hidden

B, L, H, V = 4, 5, 6, 30
OPTIONS = {
    "GRPO": LossOptions(kl_coefficient=0.1),
    "no reference": LossOptions(kl_coefficient=0),
    "GSPO": LossOptions(ratio="sequence", kl_coefficient=0, clip_low=0.05, clip_high=0.05),
    "GSPO, KL, entropy": LossOptions(ratio="sequence", kl_coefficient=0.1, entropy_coefficient=0.2),
    "CISPO": LossOptions(cispo=True, kl_coefficient=0),
    "DAPO": LossOptions(aggregation="token", clip_high=0.28, kl_coefficient=0),
    "Dr. GRPO": LossOptions(aggregation="constant", constant=7, kl_coefficient=0),
    "entropy": LossOptions(entropy_coefficient=0.3),
    "k1, unbiased": LossOptions(kl_estimator="k1", kl_coefficient=0.1, kl_unbiased=True),
    "truncated": LossOptions(correction="truncate", correction_high=1.1),
    "masked by sequence": LossOptions(correction="mask", correction_level="sequence", correction_low=0.5),
    "dual clip": LossOptions(ratio_bound=1.3),
}


class Problem:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight = random(B, L, H).requires_grad_(), random(V, H).requires_grad_()
        self.targets = torch.randint(V, (B, L), generator=generator)
        self.mask = torch.rand(B, L, generator=generator) < 0.7
        self.mask[1] = False  # a sequence without a token
        self.advantages = random(B)
        self.advantages[2] = 0
        self.temperature = 0.8
        exact = self.log_probs()[0].detach()
        self.old, self.ref, self.rollout = (exact + 0.2 * random(B, L) for _ in range(3))

    def log_probs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets, and entropy."""
        logs = torch.log_softmax(self.hidden @ self.weight.t() / self.temperature, dim=-1)
        return logs.gather(-1, self.targets.unsqueeze(-1)).squeeze(-1), -(logs.exp() * logs).sum(-1)

    def given(self, options: LossOptions) -> dict[str, torch.Tensor | None]:
        rollout = self.rollout if options.correction != "none" else None
        return {"normalizer": 11.0, "rollout_log_probs": rollout}


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_gradients_and_metrics_are_those_of_grpo_loss(name: str, on_policy: bool) -> None:
    p, options = Problem(), OPTIONS[name]
    old = None if on_policy else p.old
    ref = p.ref if options.kl_coefficient else None
    log_probs, entropy = p.log_probs()
    expected, wanted = grpo_loss(
        log_probs, old, ref, p.advantages, p.mask, options, entropy=entropy, **p.given(options)
    )
    loss, metrics = grpo_loss_from_hidden(
        p.hidden, p.weight, p.targets, old, ref, p.advantages, p.mask, options,
        temperature=p.temperature, chunk=6, **p.given(options),
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for actual, one in zip(
        *(torch.autograd.grad(value, (p.hidden, p.weight)) for value in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(actual, one, rtol=1e-11, atol=1e-12)
    assert metrics.keys() >= wanted.keys() and "entropy" in metrics
    for metric, value in wanted.items():
        torch.testing.assert_close(
            metrics[metric], value, rtol=1e-11, atol=1e-12, msg=lambda text, m=metric: f"{m} {text}"
        )


def products(options: LossOptions, **changes) -> tuple[int, int, int]:
    """Rows of the three products: of logits, of the hidden states' gradient, of the weight's."""
    p = Problem()
    given = {"old_log_probs": p.old, "ref_log_probs": None} | p.given(options) | changes
    with TensorWatch() as watch:
        loss, _ = grpo_loss_from_hidden(
            p.hidden, p.weight, p.targets, advantages=p.advantages, mask=p.mask, options=options, **given
        )
        loss.backward()
    rows = [[], [], []]
    for left, inner, right in watch.products:
        kind = {(H, V): 0, (V, H): 1}.get((inner, right), 2)
        rows[kind].append(inner if kind == 2 else left)
    return tuple(map(sum, rows))


def test_prompts_take_no_product_and_sequences_of_equal_rewards_take_one() -> None:
    p = Problem()
    counted = int(p.mask.sum())
    teaching = int(p.mask[p.advantages != 0].sum())
    assert 0 < teaching < counted < B * L
    assert products(LossOptions(kl_coefficient=0, clip_low=9, clip_high=9)) == (counted, teaching, teaching)
    entropy = LossOptions(kl_coefficient=0, entropy_coefficient=0.1)
    assert products(entropy) == (counted, counted, counted)
    by_sequence = dataclasses.replace(OPTIONS["GSPO"], clip_low=9, clip_high=9)
    assert products(by_sequence) == (2 * counted, teaching, teaching)
    assert products(by_sequence, old_log_probs=None) == (counted, teaching, teaching)


def test_clipped_tokens_skip_two_products() -> None:
    p = Problem()
    pushed_up = torch.where(p.advantages.unsqueeze(1) > 0, -9.0, 9.0).expand(B, L)
    old = p.log_probs()[0].detach() + pushed_up  # every ratio is far outside, where its advantage pushed it
    assert products(LossOptions(kl_coefficient=0), old_log_probs=old)[1:] == (0, 0)


def test_packed_rows_and_advantages_by_token_are_taken_as_grpo_loss_takes_them() -> None:
    p, options = Problem(), LossOptions(ratio="sequence", kl_coefficient=0)
    sequences = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 3, 3], [4] * 5, [5, 6, 6, 6, 7]])
    advantages = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[sequences]
    log_probs, entropy = p.log_probs()
    more = {"normalizer": 8, "sequences": sequences}
    expected, _ = grpo_loss(log_probs, p.old, None, advantages, p.mask, options, entropy=entropy, **more)
    loss, _ = grpo_loss_from_hidden(
        p.hidden.flatten(0, 1), p.weight, p.targets, p.old, None, advantages, p.mask, options,
        temperature=p.temperature, **more,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for actual, one in zip(*(torch.autograd.grad(value, p.weight) for value in (loss, expected)), strict=True):
        torch.testing.assert_close(actual, one, rtol=1e-11, atol=1e-12)


class Head(nn.Module):
    """A pipeline's only stage: an embedding, and the loss of microbatch ``m``, the tokens of row ``m``."""

    def __init__(self, p: Problem) -> None:
        super().__init__()
        self.p, self.weight_gradients = p, None
        self.hidden, self.weight = nn.Parameter(p.hidden.detach().clone()), nn.Parameter(p.weight.detach().clone())

    def forward(self, activations: tuple, m: int) -> StageOutput:
        p, row = self.p, slice(m, m + 1)
        loss, metrics = grpo_loss_from_hidden(
            self.hidden[row], self.weight, p.targets[row], p.old[row], None, p.advantages[row], p.mask[row],
            LossOptions(kl_coefficient=0), normalizer=B, store=self.weight_gradients,
        )  # fmt: skip
        return StageOutput(losses=(loss,), metrics={"loss": loss})


@pytest.mark.parametrize(
    "table",
    ["0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3,0R", "0F0,0I0,0F1,0I1,0W0,0F2,0I2,0W1,0F3,0B3,0W2,0R",
     "0F0,0F1,0C0,0B0,0F2,0C2,0I2,0C1,0B1,0F3,0W2,0C3,0B3,0R"],
    ids=["GPipe", "weight gradients apart", "forwards computed again"],
)  # fmt: skip
def test_gradients_are_the_same_under_every_schedule_and_no_product_is_made_twice(table: str) -> None:
    p = Problem()
    loss, _ = grpo_loss_from_hidden(
        p.hidden, p.weight, p.targets, p.old, None, p.advantages, p.mask, LossOptions(kl_coefficient=0)
    )
    expected = torch.autograd.grad(loss, (p.hidden, p.weight))
    stage = Head(p)
    executor = PipelineExecutor(Table.from_csv(table), {0: stage}, None)
    assert stage.weight_gradients is executor.weight_gradients
    through_autograd: list[bool] = []
    stage.weight.register_hook(lambda gradient: through_autograd.append(gradient is not None))
    for runs in (1, 2):
        with TensorWatch() as watch:
            metrics = executor.run(range(B))
        assert len(watch.products) == 3 * 2 + 1  # a row has no token, and one has no advantage
        torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
        for parameter, gradient in zip((stage.hidden, stage.weight), expected, strict=True):
            torch.testing.assert_close(parameter.grad, runs * gradient, rtol=1e-11, atol=1e-12)
    assert not any(through_autograd)
    with TensorWatch() as watch:
        executor.run(range(B), forward_only=True)
    assert len(watch.products) == B - 1


DOUBLE = torch.float64
MISTAKES = {
    "no reference": ({"ref_log_probs": None}, "kl_coefficient=0.001: needs ref_log_probs"),
    "no rollout": ({"options": LossOptions(correction="mask")}, "correction=mask: needs rollout_log_probs"),
    "targets of another shape": ({"targets": torch.zeros(B, 6, dtype=torch.int64)}, r"targets is \[4, 6\], where mask"),
    "hidden of another shape": ({"hidden": torch.zeros(B, 4, H, dtype=DOUBLE)}, r"must be \[16\], as hidden"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_fits(mistake: str) -> None:
    p = Problem()
    changes, message = MISTAKES[mistake]
    given = {"hidden": p.hidden, "weight": p.weight, "targets": p.targets, "old_log_probs": p.old}
    given |= {"ref_log_probs": p.ref, "advantages": p.advantages, "mask": p.mask}
    with pytest.raises(ValueError, match=message):
        grpo_loss_from_hidden(**(given | changes))
