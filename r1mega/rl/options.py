"""The settings of the objective and of the advantages, without torch, so that a command line can have them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["token", "sequence"]
Aggregation = Literal["sequence", "token", "constant"]
KLEstimator = Literal["k1", "k2", "k3"]
Correction = Literal["none", "truncate", "mask"]


@dataclass(frozen=True)
class LossOptions:
    """What the objective is. The defaults are GRPO as DeepSeek-R1 writes it (arXiv 2501.12948, equation 1).

    With the ratio ``r = pi / pi_old``, the advantage A and the weight w of :func:`token_weights`, the loss is

        sum over tokens of  w * (-c * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coefficient * KL
                                 - entropy_coefficient * H)

    with c = 1 unless ``correction`` is on. No log-ratio is bounded before it is exponentiated (verl clamps it to 20).

    Args:
        ratio: ``token``: each token has its own ratio. ``sequence``: GSPO (arXiv 2507.18071), the geometric mean of the
            ratios of a sequence, ``exp(mean log r)``, for all its tokens; the gradient goes through the token's own
            log-probability (its "GSPO-token" form, as in verl). TRL differentiates the mean itself, which is the same
            as long as whatever multiplies the ratio (advantage, weight, correction) is the same for all the tokens of a
            sequence: it is not with ``correction_level="token"``, ``kl_unbiased`` or advantages that differ by token.
        clip_low: the ratio is clipped from below at ``1 - clip_low``; from 1 up this does nothing.
        clip_high: and from above at ``1 + clip_high``, always, in CISPO as well (DAPO: 0.28; R1's first RL: 10).
        ratio_bound: where A < 0 the ratio itself is bounded by this, too ("dual clip", arXiv 1912.09729; TRL's
            ``delta``; verl's ``clip_ratio_c``). None is off. Must be over ``1 + clip_high``: there all definitions
            agree. verl has it always on, with 3, which silently takes the gradient of every token with A < 0 and r > 3
            from R1's ``clip_high=10``.
        cispo: CISPO (arXiv 2506.13585): ``-clip(r) A log pi`` with no gradient through the clipped ratio, so that no
            token loses its gradient. verl and slime mean ``1 + clip_high`` as here; TRL's and Liger's ``epsilon_high``
            is the bound itself (their 5 is ``clip_high=4``) and they have no lower one (``clip_low=1``).
        aggregation: how tokens become one number. ``sequence``: the mean over sequences of the mean over their tokens
            (GRPO). ``token``: the mean over all tokens (DAPO); TRL's ``bnpo`` is this over one microbatch, TRL's
            ``dapo`` and ``cispo`` are this over the global batch. ``constant``: the sum over tokens, divided by
            ``constant`` and by the number of sequences (Dr. GRPO, arXiv 2503.20783; TRL's ``dr_grpo``). verl's
            ``seq-mean-token-sum-norm`` does not divide by the number of sequences: it is that many times this one. With
            ``constant=1`` it is the mean over sequences of their sums (TRL's ``luspo``; verl's ``seq-mean-token-sum``).
        constant: for ``aggregation="constant"``: the longest possible completion, in tokens.
        kl_coefficient: of the KL divergence from the reference policy, as a part of the loss (not of the reward).
        kl_estimator: of KL(pi, pi_ref) from the sampled token, with ``d = log pi - log pi_ref``. ``k1``: d, unbiased,
            but its gradient is zero in the mean. ``k2``: d^2 / 2, whose gradient is the divergence's on-policy.
            ``k3``: ``exp(-d) + d - 1``, unbiased and never negative (DeepSeek; TRL has this alone).
        kl_unbiased: multiply it by the (unclipped, differentiable) ratio, so that value and gradient are right
            off-policy, too (DeepSeek-V3.2, arXiv 2512.02556; TRL's ``use_bias_correction_kl``, which is on there).
        entropy_coefficient: of the entropy of the *distribution* at each token, added as a bonus and aggregated like
            the rest (as in verl). TRL takes its mean over all tokens whatever the aggregation is. Megatron-RL's
            "entropy" is -p log p of the sampled token alone.
        correction: for rollouts whose probabilities differ from those of the training forward (another engine, older
            weights), by ``c = pi_old / pi_rollout``. ``truncate``: c is clamped to [correction_low, correction_high]
            (truncated importance sampling). ``mask``: tokens with c outside are dropped, the others have c. It
            multiplies the policy's part alone, never KL or entropy, as in TRL and verl; the weights stay, so a dropped
            token still counts in the normaliser.
        correction_level: ``token``, or ``sequence``: c is the *product* over the sequence, not the geometric mean
            that ``ratio="sequence"`` takes (both as in TRL).
        correction_low: see ``correction``.
        correction_high: see ``correction`` (TRL: 3; verl: 2).
    """

    ratio: Level = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_bound: float | None = None
    cispo: bool = False
    aggregation: Aggregation = "sequence"
    constant: float | None = None
    kl_coefficient: float = 0.001
    kl_estimator: KLEstimator = "k3"
    kl_unbiased: bool = False
    entropy_coefficient: float = 0.0
    correction: Correction = "none"
    correction_level: Level = "token"
    correction_low: float = 0.0
    correction_high: float = 2.0

    def __post_init__(self) -> None:
        choices = {"ratio": Level, "aggregation": Aggregation, "kl_estimator": KLEstimator}
        choices |= {"correction": Correction, "correction_level": Level}
        for name, allowed in choices.items():
            values = get_args(allowed)
            self._require(name, getattr(self, name) in values, f"must be one of {', '.join(values)}")
        for name in ("clip_low", "clip_high", "kl_coefficient", "correction_low"):
            self._require(name, getattr(self, name) >= 0, "must be at least 0")
        for name in ("kl_coefficient", "entropy_coefficient"):
            self._require(name, math.isfinite(getattr(self, name)), "must be finite")
        self._require("correction_high", self.correction_high > self.correction_low, "must be over correction_low")
        if self.aggregation == "constant":
            fits = self.constant is not None and self.constant > 0
            self._require("constant", fits, "aggregation=constant needs a number over 0, as the longest completion")
        else:
            self._require("constant", self.constant is None, "is for aggregation=constant alone")
        if self.ratio_bound is not None:
            self._require("ratio_bound", not self.cispo, "has no meaning with cispo, whose ratio is always bounded")
            fits = self.ratio_bound > 1 + self.clip_high
            self._require("ratio_bound", fits, f"must be over 1 + clip_high ({1 + self.clip_high:g})")

    def _require(self, name: str, fits: bool, what: str) -> None:
        if not fits:
            raise ValueError(f"{name}={getattr(self, name)}: {what}")


@dataclass(frozen=True)
class AdvantageOptions:
    """How rewards become advantages: ``A = (r - mean) / (std + epsilon)`` over the completions of one prompt.

    Args:
        divide_by_std: False leaves the division out (Dr. GRPO, arXiv 2503.20783; TRL's ``scale_rewards="none"``).
        std_divisor: of the sum of squares: ``n`` (the paper's formula; Megatron-RL) or ``n-1`` (TRL, verl). With G
            completions the two differ by a factor of sqrt(G / (G - 1)).
        epsilon: added to the standard deviation (TRL and Megatron-RL: 1e-4; verl: 1e-6; the paper has none).
    """

    divide_by_std: bool = True
    std_divisor: Literal["n", "n-1"] = "n"
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.std_divisor not in ("n", "n-1"):
            raise ValueError(f"std_divisor={self.std_divisor}: must be n or n-1")
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon={self.epsilon}: must be at least 0 and finite")


@dataclass(frozen=True)
class PPOOptions:
    """What PPO has besides the policy's objective (arXiv 1707.06347; the names of arXiv 1506.02438 for the advantages).

    Args:
        discount: gamma, of rewards by token; 1 is usual for language models.
        trace: lambda of generalised advantage estimation; 1 takes the whole return, 0 one token ahead.
        value_clip: how far a value may move from the rollout's before its loss is clipped; None is off.
        value_coefficient: of the value loss in the sum.
        reward_kl_coefficient: of the KL divergence (k1) that is taken off each token's *reward*, as in InstructGPT; the
            ``kl_coefficient`` of :class:`LossOptions` is of a KL term in the *loss* and the two do not compare.
    """

    discount: float = 1.0
    trace: float = 0.95
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    reward_kl_coefficient: float = 0.0

    def __post_init__(self) -> None:
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        for name in ("value_clip", "value_coefficient", "reward_kl_coefficient"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: must be at least 0 and finite")
