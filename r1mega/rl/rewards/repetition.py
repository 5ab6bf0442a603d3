"""A penalty for saying the same again and again."""

from __future__ import annotations

import re

from r1mega.config import require
from r1mega.rl.rewards.definition import reward
from r1mega.rl.rewards.sample import Sample

# A word, a character of a script that has no spaces, or a mark.
_UNIT = re.compile(r"[぀-ヿ㐀-䶿一-鿿]|[^\W぀-ヿ㐀-䶿一-鿿]+|[^\w\s]")


def check(ngram: int = 20) -> None:
    """Check the argument. Raises :class:`~r1mega.config.ConfigError`."""
    require(ngram > 0, "rewards.arguments.repetition.ngram", ngram, "must be positive")


@reward(check=check)
def repetition(sample: Sample, ngram: int = 20) -> float:
    """Minus the share of repeated n-grams: distinct ÷ all - 1, from 0 (none is repeated) to nearly -1.

    The n-gram penalty of Yeo et al. (arXiv 2502.03373, section 4) as one number for the whole completion; the paper
    takes n = 40 tokens. Here n counts words, marks, and characters of Chinese and Japanese. A completion of fewer than
    n has 0.
    """
    units = _UNIT.findall(sample.completion)
    count = len(units) - ngram + 1
    if count < 1:
        return 0.0
    distinct = len({tuple(units[i : i + ngram]) for i in range(count)})
    return distinct / count - 1.0
