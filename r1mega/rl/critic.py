"""PPO's part of a step (arXiv 1707.06347): a value head on the policy's hidden states in place of a group's mean.

The head predicts, at each token of a completion, the reward that is still to come. It is a parameter of the last stage
(``model.value_head``), trained with the policy and beside its loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.pipeline.executor import StageOutput
from r1mega.rl.loss import token_weights
from r1mega.rl.microbatches import LogProbHead, Microbatch, ObjectiveHead
from r1mega.rl.options import LossOptions, PPOOptions
from r1mega.rl.ppo import gae, moments, token_rewards, value_losses, whiten
from r1mega.rl.samples import Sample
from r1mega.tensor_parallel.collectives import gather_tokens
from r1mega.tensor_parallel.layers import Linear


def predict(value_head: Linear, hidden_TH: Tensor) -> Tensor:
    """``[T]``, float32 or wider: the value before each next token."""
    return value_head(hidden_TH).squeeze(1).to(torch.promote_types(hidden_TH.dtype, torch.float32))


class ValueHead(LogProbHead):
    """Keeps the values ``[T]``, besides log-probabilities."""

    def __init__(self, microbatch: Microbatch, temperature: float, value_head: Linear) -> None:
        super().__init__(microbatch, temperature)
        self._value_head = value_head
        self.values: Tensor | None = None

    def __call__(self, hidden_TH: Tensor, lm_head: Linear, group: ProcessGroup) -> StageOutput:
        self.values = predict(self._value_head, gather_tokens(hidden_TH, group))
        return super().__call__(hidden_TH, lm_head, group)


class PPOHead(ObjectiveHead):
    """The policy's loss, plus ``value_coefficient`` times that of the values.

    Args:
        microbatch: whose samples have ``values`` and ``returns``.
        options: the policy's objective.
        temperature: of the log-probabilities.
        normalizer: of the whole global batch.
        ppo: the value's part.
        value_head: of the last stage.
    """

    def __init__(
        self,
        microbatch: Microbatch,
        options: LossOptions,
        temperature: float,
        normalizer: float,
        ppo: PPOOptions,
        value_head: Linear,
    ) -> None:
        super().__init__(microbatch, options, temperature, normalizer)
        self._ppo, self._value_head = ppo, value_head

    def __call__(self, hidden_TH: Tensor, lm_head: Linear, group: ProcessGroup) -> StageOutput:
        output = super().__call__(hidden_TH, lm_head, group)
        microbatch = self._microbatch
        values = predict(self._value_head, gather_tokens(hidden_TH, group)).view(microbatch.shape)
        old, returns = microbatch.by_token("values", values.dtype), microbatch.by_token("returns", values.dtype)
        assert old is not None and returns is not None
        mask = microbatch.mask(in_loss_only=True)
        weights = token_weights(mask, self._options, self._normalizer, microbatch.sequences(), values.dtype)
        losses = value_losses(values.where(mask, 0), old, returns, self._ppo)
        if group.rank() == 0 and self.metrics is not None:
            self.metrics["value_loss"] = losses.detach().where(mask, 0).sum(dtype=torch.float64)
        # Every tensor-parallel rank computes the whole loss, and gradients are summed over them.
        loss = (losses * weights).sum() * (self._ppo.value_coefficient / group.size())
        output.losses = (*output.losses, loss)
        return output


@torch.no_grad()
def add_advantages(
    samples: Sequence[Sample], rewards: Sequence[float], options: PPOOptions, group: ProcessGroup
) -> None:
    """Advantages by generalised estimation, with mean 0 and variance 1 over the rollout; returns. A collective call.

    Args:
        samples: of this data-parallel rank, with ``values`` (and log-probabilities where KL is a part of the reward).
        rewards: of each.
        options: discount, trace, KL in the reward.
        group: the data-parallel ranks.
    """
    estimates = []
    for sample, reward in zip(samples, rewards, strict=True):
        mask = torch.ones(1, len(sample.tokens), dtype=torch.bool)
        assert sample.values is not None
        values = sample.values.to(torch.float64).view(1, -1)
        old, ref = (None if x is None else x.view(1, -1) for x in (sample.old_log_probs, sample.ref_log_probs))
        earned = token_rewards(torch.tensor([reward], dtype=torch.float64), mask, old, ref, options)
        advantages, returns = gae(earned, values, mask, options)
        estimates.append(advantages[0])
        sample.returns = returns[0]
    flat = torch.cat(estimates) if estimates else torch.zeros(0, dtype=torch.float64)
    everything = torch.ones_like(flat, dtype=torch.bool)
    sums = moments(flat, everything)
    if group.size() > 1:
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        sums = sums.to(device)
        dist.all_reduce(sums, group=group)
        sums = sums.cpu()
    whitened = whiten(flat, everything, sums)
    for sample, part in zip(samples, whitened.split([len(sample.tokens) for sample in samples]), strict=True):
        sample.advantage = part
