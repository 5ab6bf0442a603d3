"""A penalty for answers that near the maximum length."""

from __future__ import annotations

from r1mega.config import require
from r1mega.rl.rewards.definition import RewardFailure, reward
from r1mega.rl.rewards.sample import Sample


def check(max_length: int, buffer: int) -> None:
    """Check the arguments. Raises :class:`~r1mega.config.ConfigError`."""
    prefix = "rewards.arguments.length"
    require(max_length > 0, f"{prefix}.max_length", max_length, "must be positive")
    require(0 < buffer <= max_length, f"{prefix}.buffer", buffer, f"must be between 1 and max_length ({max_length})")


@reward(check=check)
def length(sample: Sample, max_length: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): 0 to -1.

    0 up to ``max_length - buffer`` tokens, from there down in a straight line to -1 at ``max_length``, -1 beyond.

    Args:
        sample: needs ``data["num_tokens"]``, the length of the completion, which the trainer knows.
        max_length: tokens.
        buffer: tokens; DAPO has 4096 of 20480.
    """
    num_tokens = sample.data.get("num_tokens")
    if not isinstance(num_tokens, int):
        raise RewardFailure("no length: sample.data has no num_tokens")
    return max(-1.0, min(0.0, (max_length - buffer - num_tokens) / buffer))
