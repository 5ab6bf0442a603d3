"""Random numbers for the objective, and the objective written as plainly as it can be: loops over floats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from r1mega.rl import LossOptions

VARIANTS: dict[str, LossOptions] = {
    "grpo": LossOptions(kl_coefficient=0.1),
    "on-the-k1-side": LossOptions(kl_coefficient=0.1, kl_estimator="k1"),
    "k2-unbiased": LossOptions(kl_coefficient=0.1, kl_estimator="k2", kl_unbiased=True),
    "k3-unbiased": LossOptions(kl_coefficient=0.1, kl_unbiased=True),
    "r1": LossOptions(clip_low=10, clip_high=10),
    "dapo": LossOptions(clip_high=0.28, aggregation="token", kl_coefficient=0),
    "dr-grpo": LossOptions(aggregation="constant", constant=9, kl_coefficient=0),
    "gspo": LossOptions(ratio="sequence", clip_low=0.1, clip_high=0.15),
    "two-sided": LossOptions(ratio_bound=1.5),
    "gspo-two-sided": LossOptions(ratio="sequence", ratio_bound=1.3, aggregation="constant", constant=2),
    "cispo": LossOptions(cispo=True, clip_low=0.3, clip_high=0.5, aggregation="token"),
    "entropy": LossOptions(entropy_coefficient=0.2, kl_coefficient=0),
    "truncate": LossOptions(correction="truncate", correction_low=0.7, correction_high=1.4),
    "mask": LossOptions(correction="mask", correction_low=0.5, aggregation="token"),
    "truncate-sequence": LossOptions(correction="truncate", correction_level="sequence", correction_high=1.5),
    "mask-sequence": LossOptions(correction="mask", correction_level="sequence", ratio="sequence"),
}


def make_inputs(seed: int = 0, rows: int = 6, length: int = 8) -> dict[str, Tensor]:
    """Arguments of ``grpo_loss`` by name, float64: rows of many lengths, with holes; one row has no token."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(rows, length, generator=generator, dtype=torch.float64)

    log_probs = -1.5 + 0.5 * noise()
    old = log_probs + 0.5 * noise()
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows,), generator=generator)[:, None]
    mask &= torch.rand(rows, length, generator=generator) < 0.9
    mask[0], mask[1, 0], mask[2] = True, True, False
    return {
        "log_probs": log_probs,
        "old_log_probs": old,
        "ref_log_probs": log_probs + 0.5 * noise(),
        "advantages": torch.randn(rows, generator=generator, dtype=torch.float64),
        "mask": mask,
        "entropy": noise().exp(),
        "rollout_log_probs": old + 0.4 * noise(),
    }


def plain_loss(options: LossOptions, inputs: dict[str, Any]) -> float:
    """The objective as its docstring states it, one token at a time."""
    given = {name: value.tolist() for name, value in inputs.items()}
    rows = range(len(given["mask"]))
    tokens = [[t for t, kept in enumerate(row) if kept] for row in given["mask"]]
    total = 0.0
    for b in rows:
        logs = [given["log_probs"][b][t] - given["old_log_probs"][b][t] for t in tokens[b]]
        differences = [given["old_log_probs"][b][t] - given["rollout_log_probs"][b][t] for t in tokens[b]]
        for i, t in enumerate(tokens[b]):
            log_ratio = logs[i] if options.ratio == "token" else sum(logs) / len(logs)
            loss = _policy(options, math.exp(log_ratio), given["advantages"][b], given["log_probs"][b][t])
            difference = differences[i] if options.correction_level == "token" else sum(differences)
            loss *= _correction(options, math.exp(difference))
            d = given["log_probs"][b][t] - given["ref_log_probs"][b][t]
            kl = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}[options.kl_estimator]
            loss += options.kl_coefficient * kl * (math.exp(log_ratio) if options.kl_unbiased else 1)
            loss -= options.entropy_coefficient * given["entropy"][b][t]
            if options.aggregation == "sequence":
                total += loss / len(tokens[b]) / len(rows)
            elif options.aggregation == "token":
                total += loss / sum(len(row) for row in tokens)
            else:
                assert options.constant is not None
                total += loss / options.constant / len(rows)
    return total


def _policy(options: LossOptions, ratio: float, advantage: float, log_prob: float) -> float:
    clipped = min(max(ratio, 1 - options.clip_low), 1 + options.clip_high)
    if options.cispo:
        return -clipped * advantage * log_prob
    loss = max(-ratio * advantage, -clipped * advantage)
    if options.ratio_bound is not None and advantage < 0:
        loss = min(loss, -options.ratio_bound * advantage)
    return loss


def _correction(options: LossOptions, quotient: float) -> float:
    low, high = options.correction_low, options.correction_high
    if options.correction == "truncate":
        return min(max(quotient, low), high)
    if options.correction == "mask":
        return quotient if low <= quotient <= high else 0.0
    return 1.0
