"""Reinforcement learning from rewards that rules compute: the objective, advantages, PPO's parts.

``from r1mega.rl import grpo_loss`` gives the objective alone; nothing is imported until it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r1mega.rl.advantages import AdvantageOptions, group_advantages
    from r1mega.rl.loss import LossOptions, grpo_loss, mean_metrics, merge_metrics
    from r1mega.rl.loss_head import grpo_loss_from_hidden

_HOMES = {
    "AdvantageOptions": "options",
    "LossOptions": "options",
    "group_advantages": "advantages",
    "grpo_loss": "loss",
    "grpo_loss_from_hidden": "loss_head",
    "mean_metrics": "loss",
    "merge_metrics": "loss",
}

__all__ = [
    "AdvantageOptions",
    "LossOptions",
    "group_advantages",
    "grpo_loss",
    "grpo_loss_from_hidden",
    "mean_metrics",
    "merge_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
