"""Format: first the thinking, then the answer, each in its tags."""

from __future__ import annotations

import re

from r1mega.rl.rewards.definition import reward
from r1mega.rl.rewards.sample import Sample

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SHAPE = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


@reward()
def format_reward(sample: Sample) -> float:
    """1 for ``<think>…</think> <answer>…</answer>``: each tag once, in this order, only white space around; else 0.

    Where the prompt ends with ``<think>`` (the ``r1_chat`` template), that tag counts as the completion's first.
    """
    begun = "<think>" if sample.prompt.rstrip().endswith("<think>") else ""
    text = begun + sample.completion
    return float(all(text.count(tag) == 1 for tag in _TAGS) and _SHAPE.fullmatch(text) is not None)
