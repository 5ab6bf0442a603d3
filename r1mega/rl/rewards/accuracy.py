"""Accuracy for maths: is the answer the reference?"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from r1mega.config import ConfigError, require
from r1mega.rl.rewards.answers import extract_answer, is_words, normalise, number
from r1mega.rl.rewards.definition import RewardFailure, reward
from r1mega.rl.rewards.sample import Sample

_LONGEST_FORMULA = 300  # characters; the parser takes seconds for a few hundred nested brackets


def check(source: str = "answer", symbolic: bool = True) -> None:
    """Check the arguments, and that math-verify is there if it is asked for. Raises :class:`ConfigError`."""
    require(source in ("answer", "text"), "rewards.arguments.accuracy.source", source, "must be answer or text")
    if symbolic:
        try:
            _math_verify()
        except ImportError as error:
            raise ConfigError(
                "rewards.names=accuracy: math-verify is missing; pip install math-verify==0.9.0 latex2sympy2_extended"
                "==1.11.0, or set rewards.arguments.accuracy.symbolic=false to compare text and numbers only"
            ) from error


@reward(check=check, needs=["reference"])
def accuracy(sample: Sample, source: str = "answer", symbolic: bool = True) -> float:
    """1 if the completion's answer is ``sample.reference``, 0 if not or if there is no answer.

    Three steps: the normalised texts are equal; or they are equal numbers; or math-verify finds the two equal as
    formulas (``\\frac{1}{2}`` and ``0.5``, ``x^2+1`` and ``1+x^2``). math-verify forgives more than one might: a unit
    or a ``\\%`` behind the number, ``x=72`` for ``72``, a difference in the seventh digit. Words never reach it: it
    takes them for products of letters, where order does not count.

    This function has no time limit: ``9^{9^{9^9}}`` takes for ever. The pool's processes can be killed; run it there.

    Args:
        sample: needs ``reference``.
        source: where the answer stands, see :func:`~r1mega.rl.rewards.answers.extract_answer`.
        symbolic: whether to ask math-verify.
    """
    if sample.reference is None:
        raise RewardFailure("no reference")
    answer = extract_answer(sample.completion, source)
    return float(answer is not None and same_answer(answer, sample.reference, symbolic))


def same_answer(answer: str, reference: str, symbolic: bool = True) -> bool:
    """Whether two answers are the same, see :func:`accuracy`."""
    answer, reference = normalise(answer), normalise(reference)
    if answer == reference:
        return answer != ""
    value, expected = number(answer), number(reference)
    if value is not None and expected is not None:
        if value == expected:
            return True
        if value.denominator == expected.denominator == 1:
            return False
    if not symbolic or not answer or is_words(reference) or len(answer) > _LONGEST_FORMULA:
        return False
    parse, verify = _math_verify()
    gold, found = parse(reference), parse(answer)
    return bool(gold and found and verify(gold, found, timeout_seconds=None))


@functools.cache
def _math_verify() -> tuple[Callable[[str], list[Any]], Callable[..., bool]]:
    """Functions that parse a formula and compare two."""
    import math_verify

    # It warns at the first call that there is no time limit.
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The whole answer is one formula: searched for numbers, as is the default, "73 or 72" would be 72. No time limit of
    # its own: that is made with SIGALRM, which works on a main thread only.
    settings = {"extraction_config": [math_verify.LatexExtractionConfig()], "fallback_mode": "no_fallback"}

    def parse(text: str) -> list[Any]:
        return math_verify.parse(f"${text}$", parsing_timeout=None, **settings)

    return parse, math_verify.verify
