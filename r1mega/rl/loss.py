"""The GRPO objective and its variants, as pure functions of log-probabilities: no model, no process group.

:func:`grpo_loss` is the whole for ``[B, L]`` tensors. It is made of parts that a fused head or a pipeline calls, too:

- :func:`token_weights`: what each token's loss is multiplied by, so that the loss is a plain sum over tokens. Its
  normaliser is a number of the *whole global batch*, so the sum does not depend on how the batch is cut or padded;
- :func:`sequence_log_ratios` and :func:`correction_weights`: what needs whole sequences, computed before;
- :func:`token_losses`: elementwise, on tensors of any one shape; :class:`TokenObjective` is it for chunks of rows;
- :func:`loss_metrics`: sums over tokens, which :func:`merge_metrics` adds up and :func:`mean_metrics` divides.

Shapes: B rows, L positions, T = B * L tokens, R some of these T. A row is one sequence, or holds several of them
(packing) where ``sequences`` tells them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1mega.rl.loss_metrics import loss_metrics, mean_metrics, merge_metrics
from r1mega.rl.options import KLEstimator, LossOptions

__all__ = [
    "LossOptions",
    "TokenObjective",
    "correction_weights",
    "grpo_loss",
    "kl_estimate",
    "loss_metrics",
    "mean_metrics",
    "merge_metrics",
    "sequence_log_ratios",
    "token_losses",
    "token_weights",
]


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    options: LossOptions | None = None,
    *,
    normalizer: float | Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    sequences: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one microbatch; over the microbatches and ranks of a global batch, losses and gradients *add up*.

    What stands at masked positions has no influence, NaN and infinity included. Half precision is computed in float32.

    Args:
        log_probs: ``[B, L]``, log-probability of each token under the policy in training; differentiable.
        old_log_probs: ``[B, L]``, under the weights that made the rollout. None: the policy itself (ratio 1), for one
            update a rollout.
        ref_log_probs: ``[B, L]``, under the reference policy; None only with ``kl_coefficient=0``.
        advantages: ``[B]``, or ``[B, L]`` where they differ by token or rows are packed.
        mask: ``[B, L]`` bool (or 0 and 1): True at the tokens of completions that count.
        options: the objective; :class:`LossOptions` of its defaults if None.
        normalizer: of the whole global batch: its number of sequences for ``aggregation`` "sequence" and "constant", of
            mask-True tokens for "token". None: of these tensors, which is right where they are the global batch.
        entropy: ``[B, L]``, of the distribution at each token; needed for ``entropy_coefficient``.
        rollout_log_probs: ``[B, L]``, as the engine that sampled reported them; needed for ``correction``.
        sequences: ``[B, L]`` int64 for packed rows: which sequence a token is of, numbers from 0 to below ``B * L``.

    Returns:
        The loss, and metrics as :func:`loss_metrics` has them.

    Raises:
        ValueError: for shapes that do not fit, or a tensor that the options need and that is missing.
    """
    options = options or LossOptions()
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    mask = mask.to(torch.bool)
    if advantages.dim() == 1 and mask.dim() == 2:
        advantages = advantages.unsqueeze(1).expand(-1, mask.shape[1])
    given = {"log_probs": log_probs, "old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs}
    given |= {"advantages": advantages, "entropy": entropy, "rollout_log_probs": rollout_log_probs}
    for name, value in [*given.items(), ("sequences", sequences)]:
        if value is not None and value.shape != mask.shape:
            raise ValueError(f"{name} is {list(value.shape)}, where mask is {list(mask.shape)}")
    _check_given(options, ref_log_probs, entropy, rollout_log_probs)

    def clean(value: Tensor) -> Tensor:
        return value.to(dtype).where(mask, 0)

    optional = (old_log_probs, ref_log_probs, entropy, rollout_log_probs)
    old, ref, entropy, rollout = (None if value is None else clean(value) for value in optional)
    log_probs, advantages = clean(log_probs), clean(advantages)
    weights = token_weights(mask, options, normalizer, sequences, dtype)
    before = log_probs.detach() if old is None else old
    log_ratios = None
    if options.ratio == "sequence":
        log_ratios = sequence_log_ratios(log_probs, before, mask, sequences)
    correction = None
    if options.correction != "none":
        assert rollout is not None
        correction = correction_weights(before, rollout, mask, options, sequences)
    extra = {"entropy": entropy, "correction": correction, "sequence_log_ratios": log_ratios}
    losses = token_losses(log_probs, before, ref, advantages, options, weights=weights, **extra)
    metrics = loss_metrics(log_probs, before, ref, advantages, mask, options, rollout_log_probs=rollout, **extra)
    return losses.sum(), metrics


def _check_given(options: LossOptions, ref: Tensor | None, entropy: Tensor | None, rollout: Tensor | None) -> None:
    """A part of the objective whose tensor is missing would silently be no part of it."""
    if options.kl_coefficient and ref is None:
        raise ValueError(f"kl_coefficient={options.kl_coefficient}: needs ref_log_probs; 0 is without a reference")
    if options.entropy_coefficient and entropy is None:
        raise ValueError(f"entropy_coefficient={options.entropy_coefficient}: needs entropy")
    if options.correction != "none" and rollout is None:
        raise ValueError(f"correction={options.correction}: needs rollout_log_probs")


def token_weights(
    mask: Tensor,
    options: LossOptions,
    normalizer: float | Tensor | None = None,
    sequences: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What each token's loss is multiplied by, so that the loss is their sum; 0 where the mask is False.

    A sequence must not be cut between calls: "sequence" counts its tokens here. One that has no token at all adds
    nothing to the loss, but still counts among the rows that ``normalizer=None`` stands for (as in TRL; verl does
    not count it).

    Args:
        mask: ``[B, L]`` bool.
        options: ``aggregation`` and ``constant``.
        normalizer: of the global batch: number of sequences, for "token" of tokens. None: that of ``mask``.
        sequences: ``[B, L]`` for packed rows, as in :func:`grpo_loss`.
        dtype: of the result.

    Returns:
        ``[B, L]``.

    Raises:
        ValueError: packed rows do not tell how many sequences there are: ``normalizer`` is needed.
    """
    if normalizer is None:
        if options.aggregation == "token":
            normalizer = mask.sum().clamp(min=1)
        elif sequences is None:
            normalizer = max(mask.shape[0], 1)
        else:
            raise ValueError(f"aggregation={options.aggregation}: packed rows need normalizer, the number of sequences")
    weights = mask.to(dtype) / normalizer
    if options.aggregation == "sequence":
        return weights / _sequence_sums(mask.to(dtype), sequences).clamp(min=1)
    return weights / options.constant if options.constant is not None else weights


@torch.no_grad()
def sequence_log_ratios(
    log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, sequences: Tensor | None = None
) -> Tensor:
    """The mean of ``log pi - log pi_old`` over a sequence's tokens, at each of them (GSPO, equation 7); no gradient.

    Args:
        log_probs: ``[B, L]``.
        old_log_probs: ``[B, L]``.
        mask: ``[B, L]`` bool.
        sequences: ``[B, L]`` for packed rows, as in :func:`grpo_loss`.

    Returns:
        ``[B, L]``; ``[B, 1]`` is expanded, not copied.
    """
    sums = _sequence_sums((log_probs - old_log_probs).where(mask, 0), sequences)
    return sums / _sequence_sums(mask.to(sums.dtype), sequences).clamp(min=1)


@torch.no_grad()
def correction_weights(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    mask: Tensor,
    options: LossOptions,
    sequences: Tensor | None = None,
) -> Tensor:
    """The off-policy correction c of each token, as :class:`LossOptions` says; no gradient.

    Args:
        old_log_probs: ``[B, L]``, of the training forward under the weights of the rollout.
        rollout_log_probs: ``[B, L]``, as the engine that sampled reported them.
        mask: ``[B, L]`` bool.
        options: ``correction`` and what belongs to it; "none" gives the bare quotient.
        sequences: ``[B, L]`` for packed rows, as in :func:`grpo_loss`.

    Returns:
        ``[B, L]``; exactly 0 for what ``mask`` drops.
    """
    differences = (old_log_probs - rollout_log_probs).where(mask, 0)
    if options.correction_level == "sequence":
        differences = _sequence_sums(differences, sequences)
    quotients = differences.exp()
    if options.correction == "truncate":
        return quotients.clamp(options.correction_low, options.correction_high)
    if options.correction == "mask":
        kept = (quotients >= options.correction_low) & (quotients <= options.correction_high)
        return quotients.where(kept, 0)
    return quotients


def token_losses(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    options: LossOptions,
    *,
    weights: Tensor | None = None,
    entropy: Tensor | None = None,
    correction: Tensor | None = None,
    sequence_log_ratios: Tensor | None = None,
) -> Tensor:
    """The loss of each token; elementwise, all tensors of one shape, differentiable in ``log_probs`` and ``entropy``.

    A token whose ratio is clipped has a gradient of exactly 0 (with no KL and entropy), and so has one of advantage 0.

    Args:
        log_probs: ``[R]`` (or any shape), under the policy in training.
        old_log_probs: under the weights of the rollout; None: the ratio is 1.
        ref_log_probs: under the reference; needed with ``kl_coefficient``.
        advantages: of each token.
        options: the objective; ``aggregation`` plays no part here.
        weights: of :func:`token_weights`, not negative; None for 1.
        entropy: needed with ``entropy_coefficient``.
        correction: of :func:`correction_weights`; None for 1.
        sequence_log_ratios: of :func:`sequence_log_ratios`; needed for ``ratio="sequence"`` unless ``old_log_probs`` is
            None.

    Returns:
        The shape of ``log_probs``.
    """
    # Neither factor is negative, so both may go into the advantage, and need no gradient of their own.
    for factor in (weights, correction):
        advantages = advantages if factor is None else advantages * factor
    return _losses(log_probs, old_log_probs, ref_log_probs, advantages, options, weights, entropy, sequence_log_ratios)


def _losses(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    scaled_advantages: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    entropy: Tensor | None,
    sequence_log_ratios: Tensor | None,
) -> Tensor:
    """:func:`token_losses` with weight and correction already in the advantages: as few operations as there can be."""
    ratios = _log_ratios(log_probs, old_log_probs, options, sequence_log_ratios).exp()
    clipped = ratios.clamp(1 - options.clip_low, 1 + options.clip_high)
    if options.cispo:
        losses = clipped.detach() * -scaled_advantages * log_probs
    else:
        bounded = ratios if options.ratio_bound is None else ratios.clamp(max=options.ratio_bound)
        losses = -torch.minimum(bounded * scaled_advantages, clipped * scaled_advantages)
    if options.kl_coefficient:
        assert ref_log_probs is not None, "kl_coefficient needs ref_log_probs"
        kl = kl_estimate(log_probs, ref_log_probs, options.kl_estimator)
        kl = kl * ratios if options.kl_unbiased else kl
        losses = losses + kl * _times(options.kl_coefficient, weights)
    if options.entropy_coefficient:
        assert entropy is not None, "entropy_coefficient needs entropy"
        losses = losses - entropy * _times(options.entropy_coefficient, weights)
    return losses


def _times(coefficient: float, weights: Tensor | None) -> float | Tensor:
    return coefficient if weights is None else weights * coefficient


def _log_ratios(
    log_probs: Tensor, old_log_probs: Tensor | None, options: LossOptions, of_sequence: Tensor | None
) -> Tensor:
    if old_log_probs is None:
        return log_probs - log_probs.detach()
    if options.ratio == "token":
        return log_probs - old_log_probs
    assert of_sequence is not None, "ratio=sequence needs sequence_log_ratios"
    return log_probs - log_probs.detach() + of_sequence


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """KL(pi, pi_ref) of each token, estimated from the sampled token alone (``kl_estimator`` of :class:`LossOptions`).

    The names are Schulman's (http://joschu.net/blog/kl-approx.html).

    Args:
        log_probs: any shape; differentiable.
        ref_log_probs: the same shape.
        estimator: which.

    Returns:
        The same shape.
    """
    if estimator == "k1":
        return log_probs - ref_log_probs
    difference = ref_log_probs - log_probs
    return difference.square() / 2 if estimator == "k2" else difference.exp() - difference - 1


class TokenObjective:
    """:func:`token_losses` of one microbatch, asked for in chunks of rows: what a fused head calls.

    The constants lie in one table, so that a chunk gathers once.

    Args:
        options: the objective.
        advantages: ``[T]`` (here and below: or any shape with T elements, ``[B, L]`` too).
        weights: of :func:`token_weights`.
        old_log_probs: as in :func:`token_losses`, and so are the rest.
    """

    def __init__(
        self,
        options: LossOptions,
        advantages: Tensor,
        weights: Tensor,
        old_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        correction: Tensor | None = None,
        sequence_log_ratios: Tensor | None = None,
    ) -> None:
        self.options = options
        scaled = advantages if correction is None else advantages * correction
        named = {"advantages": scaled * weights, "weights": weights, "old_log_probs": old_log_probs}
        named |= {"ref_log_probs": ref_log_probs, "sequence_log_ratios": sequence_log_ratios}
        given = {name: value for name, value in named.items() if value is not None}
        self._names = list(given)
        self._table = torch.stack([value.detach().flatten() for value in given.values()])

    def __call__(self, log_probs_R: Tensor, entropy_R: Tensor | None, rows_R: Tensor) -> Tensor:
        """The weighted losses ``[R]`` of rows ``rows_R`` (int64) of the T tokens; their sum is the loss."""
        table = dict(zip(self._names, self._table.index_select(1, rows_R).unbind(), strict=True))
        old, ref, of_sequence = (table.get(name) for name in ("old_log_probs", "ref_log_probs", "sequence_log_ratios"))
        advantages, weights = table["advantages"], table["weights"]
        return _losses(log_probs_R, old, ref, advantages, self.options, weights, entropy_R, of_sequence)


def _sequence_sums(values: Tensor, sequences: Tensor | None) -> Tensor:
    """The sum over each token's sequence, at each token; ``values`` must be 0 where the mask is False."""
    if sequences is None:
        return values.sum(dim=-1, keepdim=True).expand_as(values)
    rows = sequences.flatten()
    # As many sums as there are tokens, more than there can be sequences: their number need not be asked of a GPU.
    return values.new_zeros(rows.numel()).index_add_(0, rows, values.flatten())[rows].view_as(values)
