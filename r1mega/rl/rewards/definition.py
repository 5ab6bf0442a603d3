"""What a reward is: a function with a note of what it may do. Names lead to functions here.

A reward is a pure function ``(sample, **arguments) -> float``. It keeps nothing between calls and changes nothing: that
is what makes results independent of how many processes compute them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from r1mega.config import ConfigError
from r1mega.rl.rewards.sample import Sample

Reward = Callable[..., float]
PERMISSIONS = ("files", "network", "processes")

BUILT_IN = {
    "accuracy": "r1mega.rl.rewards.accuracy:accuracy",
    "code": "r1mega.rl.rewards.programs:code",
    "format": "r1mega.rl.rewards.format:format_reward",
    "language": "r1mega.rl.rewards.language:language",
    "length": "r1mega.rl.rewards.length:length",
    "reasoning_gym": "r1mega.rl.rewards.reasoning_gym_tasks:reasoning_gym_task",
    "repetition": "r1mega.rl.rewards.repetition:repetition",
}


class RewardFailure(Exception):
    """A reward raises it to say in its own words (``what happened: details``) why it could not be computed."""


@dataclass(frozen=True)
class Definition:
    """A reward and what belongs to it.

    Args:
        function: ``(sample, **arguments) -> float``.
        allow: what it may do besides computing: ``files`` (write), ``network``, ``processes`` (start some).
        check: called with the arguments before a run starts; raises :class:`ConfigError` where they, or the machine,
            do not fit.
        needs: keys that a prompt must have: ``reference``, or others (``a|b``: one of them).
    """

    function: Reward
    allow: tuple[str, ...] = ()
    check: Callable[..., None] | None = None
    needs: tuple[str, ...] = ()


def reward(
    allow: Iterable[str] = (), check: Callable[..., None] | None = None, needs: Iterable[str] = ()
) -> Callable[[Reward], Reward]:
    """Decorator: notes on a reward, see :class:`Definition`. A plain function is a reward without any."""
    for permission in allow:
        if permission not in PERMISSIONS:
            raise ConfigError(f"reward(allow={permission!r}): must be among {', '.join(PERMISSIONS)}")

    def note(function: Reward) -> Reward:
        function.definition = Definition(function, tuple(allow), check, tuple(needs))  # type: ignore[attr-defined]
        return function

    return note


def resolve(name: str) -> Definition:
    """The reward called ``name``: one of :data:`BUILT_IN`, or ``package.module:function``, which is imported.

    Raises :class:`ConfigError` where there is none.
    """
    where = f"rewards.names={name}"
    module_name, colon, attribute = BUILT_IN.get(name, name).partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"{where}: must be {', '.join(BUILT_IN)}, or your own as package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"{where}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "has no function" if function is None else "has no function but a value"
        raise ConfigError(f"{where}: {module_name} {what} {attribute}")
    return getattr(function, "definition", None) or Definition(function)


def check_arguments(name: str, definition: Definition, arguments: dict[str, Any]) -> None:
    """Check that the reward can be called with ``arguments``. Raises :class:`ConfigError`."""
    signature = inspect.signature(definition.function)
    try:
        signature.bind(Sample("", ""), **arguments)
    except TypeError as error:
        known = list(signature.parameters)[1:]
        fits = f"it takes {', '.join(known)}" if known else "it takes no arguments"
        raise ConfigError(f"rewards.arguments.{name}: {error}; {fits}") from error
    if definition.check is not None:
        definition.check(**arguments)
