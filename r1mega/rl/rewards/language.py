"""Language consistency: how much of the chain of thought is in the target language."""

from __future__ import annotations

import re
from collections.abc import Iterator

from r1mega.config import require
from r1mega.rl.rewards.answers import chain_of_thought
from r1mega.rl.rewards.definition import reward
from r1mega.rl.rewards.sample import Sample

# Ranges of Unicode blocks. Scripts without spaces between words come one character at a time.
_RUNS = {
    "latin": "A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ",
    "cyrillic": "Ѐ-ԯ",
    "greek": "Ͱ-Ͽἀ-῿",
    "arabic": "؀-ۿݐ-ݿ",
    "hebrew": "֐-׿",
    "devanagari": "ऀ-ॿ",
    "hangul": "ᄀ-ᇿ㄰-㆏가-힣",
}
_CHARACTERS = {"han": "㐀-䶿一-鿿豈-﫿𠀀-𲎯", "kana": "぀-ヿㇰ-ㇿ", "thai": "ก-๎"}
_WORD = re.compile(
    r"\\[A-Za-z]+|"
    + "|".join(f"(?P<{name}>[{block}]+(?:['’-][{block}]+)*)" for name, block in _RUNS.items())
    + "|"
    + "|".join(f"(?P<{name}>[{block}])" for name, block in _CHARACTERS.items())
    + r"|(?P<other>[^\W\d_])"
)
_SCRIPTS = {
    "en": {"latin"},
    "zh": {"han"},
    "ja": {"han", "kana"},
    "ko": {"hangul"},
    "ru": {"cyrillic"},
    "el": {"greek"},
    "ar": {"arabic"},
    "he": {"hebrew"},
    "hi": {"devanagari"},
    "th": {"thai"},
}


def check(target: str = "en") -> None:
    """Check the argument. Raises :class:`~r1mega.config.ConfigError`."""
    require(target in _SCRIPTS, "rewards.arguments.language.target", target, f"must be {', '.join(_SCRIPTS)}")


@reward(check=check)
def language(sample: Sample, target: str = "en") -> float:
    """Share of the words of the chain of thought that are in the target language (DeepSeek-R1, section 3.1): 0 to 1.

    A word's language is told from its script, so languages that share one (English, French) are not told apart. A word
    is a run of letters of one script; Chinese, Japanese and Thai are counted by the character. Numbers, symbols, LaTeX
    commands and single Latin or Greek letters (names of variables) are no words. Where there are no words, 0.

    Args:
        sample: the completion's part between ``<think>`` and ``</think>`` counts; all of it where there are no tags.
        target: ``en`` (any language in Latin letters), ``zh``, ``ja``, ``ko``, ``ru``, ``el``, ``ar``, ``he``, ``hi``
            or ``th``.
    """
    scripts = list(word_scripts(chain_of_thought(sample.prompt, sample.completion)))
    return sum(script in _SCRIPTS[target] for script in scripts) / len(scripts) if scripts else 0.0


def word_scripts(text: str) -> Iterator[str]:
    """The script of each word of ``text``, in order."""
    for word in _WORD.finditer(text):
        script = word.lastgroup
        if script is not None and not (script in ("latin", "greek") and len(word[0]) == 1):
            yield script
