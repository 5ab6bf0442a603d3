"""Learning-rate schedules: a pure function of the step."""

from __future__ import annotations

import math

from r1mega.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """The learning rate of a step.

    Linear warm-up from zero to ``config.learning_rate`` at step ``warmup_steps``, then ``constant``, half a ``cosine``
    down to ``min_learning_rate`` at the last step (SGDR, arXiv 1608.03983), or ``wsd``: constant until the last
    ``decay_steps`` steps, which go down linearly (MiniCPM, arXiv 2404.06395).

    Args:
        step: counted from 1.
        config: peak, minimum, warm-up and shape.
        num_steps: the length of the run.
    """
    peak, lowest = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        turned = math.pi * _progress(step, config.warmup_steps, num_steps)
        return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(turned))
    decay_start = max(config.warmup_steps, num_steps - config.decay_steps)
    return peak + (lowest - peak) * _progress(step, decay_start, num_steps)


def _progress(step: int, start: int, end: int) -> float:
    """How far ``step`` is from ``start`` (0) to ``end`` (1); 0 where there is nothing between them."""
    return min(max(step - start, 0) / (end - start), 1.0) if end > start else 0.0
