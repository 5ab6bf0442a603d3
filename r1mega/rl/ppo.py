"""What PPO needs besides the policy's loss, which it shares with GRPO: advantages from a value head, and its loss.

The baseline that GRPO is compared with. Pure functions of tensors, shapes as in :mod:`r1mega.rl.loss`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from r1mega.rl.loss import grpo_loss, token_weights
from r1mega.rl.options import LossOptions, PPOOptions

__all__ = ["PPOOptions", "gae", "moments", "ppo_loss", "token_rewards", "value_losses", "whiten"]


@torch.no_grad()
def token_rewards(
    rewards: Tensor,
    mask: Tensor,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    options: PPOOptions | None = None,
) -> Tensor:
    """A completion's reward at its last token, and at every token the KL penalty ``-coefficient * (pi_old - ref)``.

    Both in log-probabilities: the estimator k1.

    Args:
        rewards: ``[B]``.
        mask: ``[B, L]`` bool; a row without a token has no reward.
        old_log_probs: ``[B, L]``; needed for ``reward_kl_coefficient``.
        ref_log_probs: ``[B, L]``; needed for ``reward_kl_coefficient``.
        options: ``reward_kl_coefficient``.

    Returns:
        ``[B, L]``.
    """
    options = options or PPOOptions()
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(dim=1, keepdim=True)
    found = rewards[:, None] * ((positions == last) & mask)
    if options.reward_kl_coefficient:
        assert old_log_probs is not None and ref_log_probs is not None, "reward_kl_coefficient needs log-probabilities"
        found = found - options.reward_kl_coefficient * (old_log_probs - ref_log_probs).where(mask, 0)
    return found


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    options: PPOOptions | None = None,
    *,
    last_values: Tensor | None = None,
    sequences: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, equation 16).

    ``A_t = sum over l of (discount * trace)^l delta_(t+l)``, ``delta_t = r_t + discount * V_(t+1) - V_t``, where t
    counts the mask-True tokens of one sequence: masked ones between them (a tool's answer) are no steps (as in verl).

    Args:
        rewards: ``[B, L]`` by token, as :func:`token_rewards` gives them.
        values: ``[B, L]``, of the value head in the rollout's weights: what it expects *before* the token.
        mask: ``[B, L]`` bool.
        options: ``discount`` and ``trace``.
        last_values: ``[B]``, V after the last token, for completions that were cut off; None: 0, the end.
        sequences: ``[B, L]`` for packed rows: which sequence a position is of, masked ones between its tokens too.

    Returns:
        Advantages (not whitened: :func:`whiten`) and returns (advantage + value), ``[B, L]``, 0 where masked.

    Raises:
        ValueError: ``last_values`` with packed rows, which have no one last token.
    """
    options = options or PPOOptions()
    if last_values is not None and sequences is not None:
        raise ValueError("last_values: not with packed rows (sequences)")
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    goes_on = torch.ones_like(values)
    goes_on[:, -1:] = 0
    if sequences is not None:
        goes_on[:, :-1] = sequences[:, 1:] == sequences[:, :-1]
    # The value of the first token that counts, from here on; then from the next position on.
    from_here = _scan(values, torch.where(mask, 0, goes_on))
    after = goes_on * torch.nn.functional.pad(from_here[:, 1:], (0, 1))
    if last_values is not None:
        still_to_come = mask.flip(1).cumsum(1).flip(1)
        after = torch.where(still_to_come <= 1, last_values[:, None], after)
    deltas = (rewards + options.discount * after - values).where(mask, 0)
    decay = torch.where(mask, options.discount * options.trace * goes_on, goes_on)
    advantages = _scan(deltas, decay).where(mask, 0)
    return advantages, advantages + values


def _scan(terms: Tensor, factors: Tensor) -> Tensor:
    """``y_t = terms_t + factors_t * y_(t+1)`` along the last dimension, in log2(L) steps of doubled reach."""
    reach = 1
    while reach < terms.shape[1]:
        ahead = (0, reach)
        terms = terms + factors * torch.nn.functional.pad(terms[:, reach:], ahead)
        factors = factors * torch.nn.functional.pad(factors[:, reach:], ahead)
        reach *= 2
    return terms


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares over the mask, ``[3]`` float64: added over all ranks, for :func:`whiten`."""
    kept = values.to(torch.float64).where(mask, 0)
    return torch.stack([mask.sum(dtype=torch.float64), kept.sum(), kept.square().sum()])


def whiten(advantages: Tensor, mask: Tensor, of_all: Tensor | None = None, epsilon: float = 1e-8) -> Tensor:
    """Mean 0, variance 1 over the tokens of the whole global batch (variance with n - 1, as in verl), 0 where masked.

    Args:
        advantages: ``[B, L]``.
        mask: ``[B, L]`` bool.
        of_all: the global sum of :func:`moments`; None: these tensors are the global batch.
        epsilon: added to the variance.
    """
    count, total, squares = (moments(advantages, mask) if of_all is None else of_all).unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean.square()) / (count - 1).clamp(min=1)
    scale = (variance.clamp(min=0) + epsilon).rsqrt()
    return ((advantages - mean.to(advantages.dtype)) * scale.to(advantages.dtype)).where(mask, 0)


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, options: PPOOptions | None = None) -> Tensor:
    """``max((V - R)^2, (clip(V) - R)^2) / 2`` of each token, with V clipped to ``old_values`` +- ``value_clip``.

    Elementwise on tensors of any one shape, differentiable in ``values``; the half is TRL's and verl's.
    """
    options = options or PPOOptions()
    losses = (values - returns).square()
    if options.value_clip is not None:
        clipped = old_values + (values - old_values).clamp(-options.value_clip, options.value_clip)
        losses = torch.maximum(losses, (clipped - returns).square())
    return losses / 2


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    options: LossOptions | None = None,
    ppo: PPOOptions | None = None,
    *,
    ref_log_probs: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's loss of :func:`r1mega.rl.loss.grpo_loss` plus ``value_coefficient`` times the value loss.

    Args:
        log_probs: ``[B, L]``, and so are the rest, all as in :func:`r1mega.rl.loss.grpo_loss`.
        advantages: ``[B, L]``, of :func:`gae`, whitened or not.
        values: ``[B, L]``, of the value head in training; differentiable.
        old_values: ``[B, L]``, of the rollout's weights.
        returns: ``[B, L]``, of :func:`gae`.
        options: None: clip 0.2, no KL in the loss, the mean over all tokens, which is PPO's usual form.
        ppo: the value's part.

    Returns:
        The loss and the metrics of the policy's part, with the sums ``value_loss`` and ``value_clip`` (tokens whose
        loss is the clipped value's).
    """
    options = options or LossOptions(kl_coefficient=0.0, aggregation="token")
    ppo = ppo or PPOOptions()
    mask = mask.to(torch.bool)
    loss, metrics = grpo_loss(
        log_probs, old_log_probs, ref_log_probs, advantages, mask, options, normalizer=normalizer, entropy=entropy
    )
    dtype = torch.promote_types(values.dtype, torch.float32)
    values, old_values, returns = (value.to(dtype).where(mask, 0) for value in (values, old_values, returns))
    losses = value_losses(values, old_values, returns, ppo)
    weights = token_weights(mask, options, normalizer, dtype=dtype)
    with torch.no_grad():
        is_clipped = losses > value_losses(values, old_values, returns, replace(ppo, value_clip=None))
        metrics["value_loss"] = losses.where(mask, 0).sum(dtype=torch.float64)
        metrics["value_clip"] = is_clipped.sum(dtype=torch.float64)
    return loss + ppo.value_coefficient * (losses * weights).sum(), metrics
