"""What is measured of a model that reasons: pass@1, pass@k, cons@k, reflection words, length of responses.

Pure functions of what a run has sampled: for each prompt a list with an entry a sample.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from r1mega.rl.rewards.answers import normalise

# The ten that DeepSeek-R1's authors counted (Nature 645, extended data figure 1), and four of the same kind.
REFLECTION_WORDS = (
    "wait",
    "mistake",
    "however",
    "but",
    "retry",
    "error",
    "verify",
    "wrong",
    "evaluate",
    "check",
    "recheck",
    "alternatively",
    "reconsider",
    "double-check",
)
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


def pass_at_1(correct: Sequence[Sequence[bool]]) -> float:
    """Mean over prompts of the share of correct samples (DeepSeek-R1, section 3).

    Args:
        correct: for each prompt, whether each of its samples is correct; at least one prompt, and one sample each.
    """
    return pass_at_k(correct, 1)


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """Mean over prompts of the chance that at least one of ``k`` samples is correct: 1 - C(n-c, k) / C(n, k).

    Unbiased for n samples of which c are correct (Chen et al., arXiv 2107.03374, equation 1).

    Raises :class:`ValueError` where a prompt has fewer than ``k`` samples.
    """
    _check(correct, k)
    chances = [
        1.0 - math.comb(len(samples) - sum(map(bool, samples)), k) / math.comb(len(samples), k) for samples in correct
    ]
    return math.fsum(chances) / len(chances)


def cons_at_k(
    answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]], k: int | None = None
) -> float:
    """Share of prompts whose majority answer is correct (cons@64 in DeepSeek-R1).

    The first ``k`` samples vote with their answers (:func:`majority`). A prompt counts as correct if the first sample
    that gave the winning answer is; where no sample gave any, it does not.

    Args:
        answers: for each prompt, the answer of each sample (``extract_answer``), None for none.
        correct: the same shape.
        k: samples that vote; None: all.

    Raises :class:`ValueError` where shapes differ or a prompt has fewer than ``k`` samples.
    """
    _check(correct, k or 1)
    if [len(samples) for samples in answers] != [len(samples) for samples in correct]:
        raise ValueError("answers and correct must have the same shape")
    right = 0
    for given, verdicts in zip(answers, correct, strict=True):
        winner = majority(given[:k])
        right += winner is not None and bool(verdicts[winner])
    return right / len(correct)


def majority(answers: Sequence[str | None]) -> int | None:
    """Index of the first sample that gave the most frequent answer; None where no sample gave one.

    Answers are compared after :func:`~r1mega.rl.rewards.answers.normalise`. Of several that are equally frequent, the
    one that was given first wins: samples have no order, so that is as good as chance, and always the same.
    """
    votes: Counter[str] = Counter()
    first: dict[str, int] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            text = normalise(answer)
            votes[text] += 1
            first.setdefault(text, index)
    return min((-count, first[text]) for text, count in votes.items())[1] if votes else None


def reflection_counts(completion: str) -> dict[str, int]:
    """How often each of :data:`REFLECTION_WORDS` stands in a completion: whole words, in small or capital letters."""
    found = Counter(_WORD.findall(completion.lower()))
    return {word: found[word] for word in REFLECTION_WORDS}


def reflection_words(completions: Sequence[str]) -> float:
    """Mean number of reflection words a completion; at least one completion."""
    _check_not_empty(completions)
    return sum(sum(reflection_counts(completion).values()) for completion in completions) / len(completions)


def mean_length(lengths: Sequence[int]) -> float:
    """Mean response length, in what ``lengths`` counts (tokens); at least one."""
    _check_not_empty(lengths)
    return sum(lengths) / len(lengths)


def _check(correct: Sequence[Sequence[bool]], k: int) -> None:
    _check_not_empty(correct)
    fewest = min(map(len, correct))
    if not 1 <= k <= fewest:
        raise ValueError(f"k={k}: must be between 1 and the number of samples of each prompt ({fewest})")


def _check_not_empty(values: Sequence[object]) -> None:
    if not values:
        raise ValueError("there is nothing to evaluate")
