"""Rewards that an untrained model gets now and then."""

from __future__ import annotations

from r1mega.rl.rewards import Sample


def digits(sample: Sample) -> float:
    """The share of digits: many values, so that few groups are flat."""
    text = sample.completion
    return sum(character.isdigit() for character in text) / max(1, len(text))


def has_one(sample: Sample) -> float:
    """Right or wrong, with both in reach of chance."""
    return float("1" in sample.completion)


def broken(sample: Sample) -> float:
    """Raises for some completions."""
    return 1.0 / float("2" not in sample.completion)


def always_broken(sample: Sample) -> float:
    """Raises for all of them."""
    raise RuntimeError("no reward today")


def hangs(sample: Sample) -> float:
    """Never answers."""
    while True:
        pass
