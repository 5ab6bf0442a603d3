"""Errors that a user reads, and the checks that raise them."""

from __future__ import annotations

import math


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line, fit to be shown to a user as it is."""


def require(condition: bool, name: str, value: object, what_fits: str) -> None:
    """Raise ``ConfigError("name=value: what_fits")`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{name}={value}: {what_fits}")


def divisors(number: int) -> str:
    """The divisors of ``number``, 1 or more, as a phrase: ``2, 4, 8 or 16``; 1 is left out where there are others."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    found = found[1:] if len(found) > 1 else found
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def require_positive(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be positive")


def require_not_negative(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{prefix}.{name}", value, "must be 0 or more")


def require_finite(prefix: str, config: object) -> None:
    """Of every number in ``config``: YAML can write infinity and NaN, and 1e999 is infinity, too."""
    for name, value in vars(config).items():
        if isinstance(value, float):
            require(math.isfinite(value), f"{prefix}.{name}", value, "must be finite")
