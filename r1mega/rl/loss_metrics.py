"""What is reported of the objective: sums over tokens, which add up over microbatches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from r1mega.rl.options import LossOptions

MAXIMUM = "_max"


@torch.no_grad()
def loss_metrics(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    options: LossOptions,
    *,
    entropy: Tensor | None = None,
    correction: Tensor | None = None,
    sequence_log_ratios: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Sums over the tokens where ``mask`` is True; nothing waits for a GPU.

    Args:
        log_probs: ``[B, L]`` or any shape, as in :func:`r1mega.rl.loss.token_losses`, and so are the rest.
        advantages: the same shape.
        mask: the same shape, bool.
        options: the objective.
        rollout_log_probs: as the engine that sampled reported them.

    Returns:
        float64 scalars: ``num_tokens``; ``ratio`` (sum) and ``ratio_max``; ``clip_low``, ``clip_high``, ``clip_bound``
        (tokens whose gradient the lower clip, the upper clip, the bound has taken; in CISPO: tokens whose ratio was
        clipped from below, from above); ``old_kl`` (sum of ``log pi_old - log pi``); ``entropy``; with a reference
        ``kl`` (sum of k3, whatever the estimator of the loss is); with a correction ``correction`` (sum of weights) and
        ``correction_cut`` (tokens dropped or truncated); with rollout log-probabilities ``rollout_difference`` (sum of
        absolute differences from the training forward's) and ``rollout_difference_max``.
        All but the ``_max`` are sums.
    """
    old = log_probs if old_log_probs is None else old_log_probs
    log_ratios = log_probs - old if sequence_log_ratios is None else sequence_log_ratios
    ratios = log_ratios.exp()
    found = {"num_tokens": mask, "ratio": ratios, "old_kl": old - log_probs}
    found |= _clipped(ratios, advantages, options)
    maxima = {"ratio": ratios}
    if entropy is not None:
        found["entropy"] = entropy
    if ref_log_probs is not None:
        difference = ref_log_probs - log_probs
        found["kl"] = difference.exp() - difference - 1
    if correction is not None:
        low, high = options.correction_low, options.correction_high
        dropped = correction == 0
        found["correction"] = correction
        found["correction_cut"] = (
            dropped if options.correction == "mask" else (correction <= low) | (correction >= high)
        )
    if rollout_log_probs is not None:
        found["rollout_difference"] = maxima["rollout_difference"] = (old - rollout_log_probs).abs()
    sums = torch.stack([value.to(torch.float64).where(mask, 0).flatten() for value in found.values()]).sum(dim=1)
    metrics = dict(zip(found, sums.unbind(), strict=True))
    for name, value in maxima.items():
        largest = value.where(mask, 0).flatten().amax() if mask.numel() else mask.new_zeros(())
        metrics[name + MAXIMUM] = largest.to(torch.float64)
    return metrics


def _clipped(ratios: Tensor, advantages: Tensor, options: LossOptions) -> dict[str, Tensor]:
    below, above = ratios < 1 - options.clip_low, ratios > 1 + options.clip_high
    if options.cispo:
        return {"clip_low": below, "clip_high": above}
    found = {"clip_low": below & (advantages < 0), "clip_high": above & (advantages > 0)}
    if options.ratio_bound is not None:
        found["clip_bound"] = (ratios > options.ratio_bound) & (advantages < 0)
    return found


def merge_metrics(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put the metrics of several microbatches or ranks together: sums are added, of ``_max`` the largest is taken."""
    merged: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name in merged:
                value = torch.maximum(merged[name], value) if name.endswith(MAXIMUM) else merged[name] + value
            merged[name] = value
    return merged


def mean_metrics(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the tokens of what was merged; ``num_tokens`` and each ``_max`` stay as they are."""
    count = max(float(metrics["num_tokens"]), 1.0)
    whole = {name for name in metrics if name == "num_tokens" or name.endswith(MAXIMUM)}
    return {name: float(value) if name in whole else float(value) / count for name, value in metrics.items()}
