"""Rotary position embedding: frequencies, YaRN and Llama 3 scaling, rotation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1mega.config import RopeConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, ``0.1 * mscale * ln(factor) + 1`` (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(config: RopeConfig, dim: int) -> Tensor:
    """``[dim / 2]`` float32: radians per position of each rotated pair."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = 1.0 / (config.theta**exponents)
    if config.scaling == "yarn":
        return _yarn(config, plain, dim)
    if config.scaling == "llama3":
        return _llama3(config, plain)
    return plain


def _yarn(config: RopeConfig, plain: Tensor, dim: int) -> Tensor:
    """Pairs that turn often keep their frequency, slow ones are interpolated, a linear ramp lies between."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(config.original_max_position / (times * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(config.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / config.factor * interpolated + plain * (1 - interpolated)


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    """Llama 3.1: as YaRN, with the ramp linear in the number of turns over the original context."""
    turns = config.original_max_position * plain / (2 * math.pi)
    kept = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = kept.clamp(0, 1)
    return plain * kept + plain / config.factor * (1 - kept)


def attention_factor(config: RopeConfig) -> float:
    """What cosine and sine are multiplied by: 1 but for YaRN with ``mscale != mscale_all_dim``."""
    if config.scaling != "yarn":
        return 1.0
    if config.mscale and config.mscale_all_dim:
        return yarn_mscale(config.factor, config.mscale) / yarn_mscale(config.factor, config.mscale_all_dim)
    return yarn_mscale(config.factor, 1.0)


def softmax_scale(config: RopeConfig, head_dim: int) -> float:
    """``head_dim ** -0.5``, times YaRN's squared ``mscale_all_dim`` temperature (DeepSeek)."""
    scale = head_dim**-0.5
    if config.scaling == "yarn" and config.mscale_all_dim:
        scale *= yarn_mscale(config.factor, config.mscale_all_dim) ** 2
    return scale


class RotaryTable:
    """Cosines and sines for positions 0, 1, ..., kept for the longest length seen of each dtype and device.

    Args:
        config: frequencies.
        dim: rotated width of a head.
    """

    def __init__(self, config: RopeConfig, dim: int) -> None:
        self.config, self.dim = config, dim
        self._kept: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, length: int, dtype: torch.dtype, device: torch.device, packed: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each ``[length, dim / 2]`` in ``dtype``. The angles are computed in float32.

        Positions begin anew with each of the ``packed`` sequences: only how far apart two tokens are counts, but angles
        are rounded.
        """
        if packed is not None:
            cos, sin = self(max(packed), dtype, device)
            return torch.cat([cos[:part] for part in packed]), torch.cat([sin[:part] for part in packed])
        kept = self._kept.get((dtype, device))
        if kept is None or kept[0].shape[0] < length:
            angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(self.config, self.dim))
            factor = attention_factor(self.config)
            kept = (angles.cos() * factor).to(device, dtype), (angles.sin() * factor).to(device, dtype)
            self._kept[dtype, device] = kept
        cos, sin = kept
        return cos[:length], sin[:length]
