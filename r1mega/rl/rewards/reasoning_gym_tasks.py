"""Accuracy for the tasks of reasoning-gym: what the task's own scorer says, all or nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from r1mega.config import ConfigError
from r1mega.rl.rewards.answers import extract_answer
from r1mega.rl.rewards.definition import RewardFailure, reward
from r1mega.rl.rewards.sample import Sample

# Tasks that cannot be used, found by scoring the gold answer and junk for every task of version 0.1.25.
UNSOUND = {
    "arc_agi": "its scorer does not know its own answers once they have been written as JSON",
    "boxnet": "it has no gold answer",
    "coin_flip": "its scorer takes 0 for any small number",
    "composite": "it is a mixture of others; name those",
    "game_of_life_halting": "its scorer gives junk full marks",
    "graph_color": "it has no gold answer",
    "propositional_logic": "it has no gold answer",
    "rearc": "its scorer does not know its own answers once they have been written as JSON",
    "rubiks_cube": "it has no gold answer",
    "rush_hour": "it has no gold answer",
}


def check(source: str = "answer") -> None:
    """Check the argument and that reasoning-gym is there. Raises :class:`ConfigError`."""
    if source not in ("answer", "text"):
        raise ConfigError(f"rewards.arguments.reasoning_gym.source={source}: must be answer or text")
    try:
        import reasoning_gym  # noqa: F401
    except ImportError as error:
        raise ConfigError("rewards.names=reasoning_gym: pip install reasoning-gym==0.1.25") from error


@reward(check=check, needs=["task", "entry"])
def reasoning_gym_task(sample: Sample, source: str = "answer") -> float:
    """1 where the scorer of the task gives the answer the full 1.0, 0 otherwise.

    The scorers give partial credit (0.01 for any answer, more where the right one is a part of it), which would be
    learned, so it is cut off. Some raise on junk (``prime_factorization``): that is a failure, and counted as one.

    Args:
        sample: needs ``data["task"]``, the task's name, and ``data["entry"]``, its question, answer and metadata; see
            ``tools/make_prompts.py``.
        source: where the answer stands, see :func:`~r1mega.rl.rewards.answers.extract_answer`.
    """
    task = sample.data["task"]
    if task in UNSOUND:
        raise RewardFailure(f"unsound task: {task}, {UNSOUND[task]}")
    answer = extract_answer(sample.completion, source)
    if answer is None:
        return 0.0
    return float(_scorer(task)(answer, sample.data["entry"]) >= 1.0)


@functools.cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)
