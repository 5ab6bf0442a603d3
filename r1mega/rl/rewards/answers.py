"""Finding the answer in a completion, and writing it in one way."""

from __future__ import annotations

import re
from fractions import Fraction

_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(/0*[1-9]\d*)?")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_WORDS = re.compile(r"[^\W\d_]{2,}([ '-]+[^\W\d_]+)*")
_WHOLE_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_DROPPED = re.compile(r"\\[()\[\],!;: ]|\$|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle(?![a-z])")
_LONGEST_NUMBER = 400  # characters; Python's own limit for integers is 4300


def final_part(completion: str) -> str:
    """What follows the last ``</think>``; the whole completion where there is none."""
    return completion.rpartition("</think>")[2]


def chain_of_thought(prompt: str, completion: str) -> str:
    """What stands between ``<think>`` and ``</think>``; where the prompt ends with ``<think>``, from the beginning.

    To the end where the thinking was cut short; the whole completion where it has no tags at all.
    """
    before, closed, _ = completion.partition("</think>")
    _, opened, inside = before.partition("<think>")
    if opened:
        return inside
    return before if closed or prompt.rstrip().endswith("<think>") else completion


def extract_answer(completion: str, source: str = "answer") -> str | None:
    """The answer that a completion gives; None where it gives none.

    Args:
        completion: the model's text.
        source: ``answer``: the content of the last ``<answer>…</answer>`` after the thinking, nothing else counts.
            ``text``: that, or else the last ``\\boxed{…}``, or else all that follows ``</think>``.
    """
    text = final_part(completion)
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    if source == "answer":
        return None
    return _last_boxed(text) or text.strip() or None


def extract_program(completion: str) -> str:
    """The last fenced block of Python in the answer (as :func:`extract_answer` finds it), or the whole answer."""
    answer = extract_answer(completion)
    text = final_part(completion) if answer is None else answer
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def normalise(answer: str) -> str:
    """One way of writing for the answers that differ in form only.

    Without the marks of LaTeX that change nothing (``$``, ``\\left``, ``\\boxed{}`` or ``\\text{}`` around it all), one
    space for much white space and none beside punctuation, ``1,234`` as ``1234``, no ``+`` before and no full stop
    after it, small letters if it consists of words. Everything else is left: ``x^2`` and ``X^2`` are two answers.
    """
    text = _DROPPED.sub("", answer.replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).strip()
    while whole := _WHOLE_COMMAND.fullmatch(text):
        text = whole[1].strip()
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r" ?([^\w\s]) ?", r"\1", text) if not _WORDS.fullmatch(text) else text
    if text.endswith(".") and len(text) > 1:
        text = text[:-1].rstrip()
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text):
        text = text.removeprefix("+")
    return text.casefold() if _WORDS.fullmatch(text) else text


def number(normalised: str) -> Fraction | None:
    """The value of an integer, a decimal or a fraction of them (``-3/4``, ``0.25``); None for anything else."""
    if len(normalised) > _LONGEST_NUMBER or not _NUMBER.fullmatch(normalised):
        return None
    numerator, _, denominator = normalised.partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


def is_words(normalised: str) -> bool:
    """Whether an answer is one word or several (of two letters or more), so that algebra has nothing to say of it."""
    return _WORDS.fullmatch(normalised) is not None


def _last_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{…}`` with its braces balanced."""
    start = text.rfind("\\boxed{")
    depth = 0
    for position in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position].strip()
    return None
