"""Which rewards a run has, what they weigh, and what they may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from r1mega.config import ConfigError, require
from r1mega.rl.rewards.definition import BUILT_IN, resolve


@dataclass
class RewardOptions:
    """The rewards of a run.

    A format reward that weighs as much as accuracy drives accuracy down while that is below about 0.1, because it is
    the easier one: give it less then.

    Args:
        names: rewards, in the order in which they are computed: accuracy, code, format, language, length,
            reasoning_gym, repetition, or your own as ``package.module:function``.
        weights: one for each name; empty means 1 for each.
        arguments: settings of a reward by its name, as in ``{"language": {"target": "zh"}}``.
        time_limit: seconds that one reward of one sample may take.
        memory_limit: MiB that one reward may allocate.
    """

    names: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    weights: list[float] = field(default_factory=list)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    time_limit: float = 10.0
    memory_limit: int = 2048

    def __post_init__(self) -> None:
        shown = ",".join(self.names)
        require(len(self.names) > 0, "rewards.names", "[]", f"name at least one of {', '.join(BUILT_IN)}")
        require(len(set(self.names)) == len(self.names), "rewards.names", shown, "must not name a reward twice")
        for name in self.names:
            if name not in BUILT_IN and ":" not in name:
                fits = f"must be {', '.join(BUILT_IN)}, or your own as package.module:function"
                raise ConfigError(f"rewards.names={name}: {fits}")
        fits = f"must have one weight for each of rewards.names ({len(self.names)}), or none"
        require(len(self.weights) in (0, len(self.names)), "rewards.weights", self.weights, fits)
        require(
            all(math.isfinite(weight) for weight in self.weights), "rewards.weights", self.weights, "must be finite"
        )
        for name, arguments in self.arguments.items():
            require(name in self.names, "rewards.arguments", name, f"must be among rewards.names ({shown})")
            require(isinstance(arguments, dict), f"rewards.arguments.{name}", arguments, "must be settings by name")
        fits = "must be positive and finite"
        require(self.time_limit > 0 and math.isfinite(self.time_limit), "rewards.time_limit", self.time_limit, fits)
        require(self.memory_limit > 0, "rewards.memory_limit", self.memory_limit, "must be positive")

    def weight(self, name: str) -> float:
        """What the reward ``name`` is multiplied by in the total."""
        return self.weights[self.names.index(name)] if self.weights else 1.0

    def needs(self) -> list[str]:
        """Keys that every prompt must have for the built-in rewards (``a|b``: one of them)."""
        return sorted({key for name in self.names if name in BUILT_IN for key in resolve(name).needs})
