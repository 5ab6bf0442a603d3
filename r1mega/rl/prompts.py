"""Prompts: JSONL files, the order in which they come, and the templates around them.

A line is ``{"prompt": "What is 3 + 4?", "reference": "7"}``. Further keys are for the rewards: ``tests`` for code,
``task`` and ``entry`` for reasoning-gym; ``tools/make_prompts.py`` writes such files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError

_ROUNDS = 6


@dataclass(frozen=True)
class Prompt:
    """A question.

    Args:
        prompt: the text, without a template.
        reference: the right answer; None where there is none.
        data: the other keys of the line.
    """

    prompt: str
    reference: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def read_prompts(paths: Sequence[str | Path], needs: Iterable[str] = (), name: str = "prompts") -> list[Prompt]:
    """All prompts of JSONL files, in order.

    Args:
        paths: files; empty lines count for nothing.
        needs: keys that every line must have (``a|b``: one of them), as
            :meth:`~r1mega.rl.rewards.options.RewardOptions.needs` tells.
        name: the setting that names the files, for errors.

    Raises :class:`ConfigError` of one line, ``file:line: …`` for what is wrong in a file.
    """
    needs = list(needs)
    if not paths:
        raise ConfigError(f"{name}=[]: name at least one file of prompts; see tools/make_prompts.py")
    found = [prompt for path in paths for prompt in _read(Path(path), needs, name)]
    if not found:
        raise ConfigError(f"{name}={','.join(map(str, paths))}: no prompts in there; see tools/make_prompts.py")
    return found


def _read(path: Path, needs: list[str], name: str) -> Iterator[Prompt]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, needs, f"{path}:{number}")
    except OSError as error:
        raise ConfigError(f"{name}={path}: cannot be read: {error.strerror}") from error


def _parse(line: bytes, needs: list[str], where: str) -> Prompt:
    try:
        entry = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 at byte {error.start}; convert it first") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ConfigError(f'{where}: must be an object, as in {{"prompt": "What is 3 + 4?", "reference": "7"}}')
    prompt, reference = entry.pop("prompt", None), entry.pop("reference", None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f"{where}: prompt={json.dumps(prompt)[:60]}: must be text, and not empty")
    if reference is not None and not isinstance(reference, str):
        raise ConfigError(f'{where}: reference={json.dumps(reference)[:60]}: must be text ("7"), or null')
    for text in (prompt, reference or ""):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{where}: half of a surrogate pair, which no UTF-8 text can hold")
    present = set(entry) | ({"reference"} if reference is not None else set())
    for need in needs:
        if not present & set(need.split("|")):
            raise ConfigError(f"{where}: has no {need.replace('|', ' or ')}, which a reward needs")
    return Prompt(prompt, reference, entry)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def prompt_index(seed: int, index: int, num_prompts: int) -> int:
    """Which prompt comes at place ``index`` of a run: a function of its arguments alone, the same everywhere for ever.

    Every epoch of ``num_prompts`` places has each prompt once, in another order. The order is a Feistel network over
    the next power of four, walked until it lands inside (Black and Rogaway, 2002), so nothing is stored and place one
    billion costs what place 0 does.

    Args:
        seed: of the order.
        index: 0 or more.
        num_prompts: 1 or more.
    """
    assert index >= 0 and num_prompts > 0
    epoch, place = divmod(index, num_prompts)
    half = max((num_prompts - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for round_number in range(_ROUNDS):
            key = f"{seed}/{epoch}/{round_number}/{half}/{right}".encode()
            mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            left, right = right, left ^ (mixed & mask)
        place = left << half | right
        if place < num_prompts:
            return place


def _plain(prompt: str) -> str:
    return prompt


def _r1_zero(prompt: str) -> str:
    return (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>. "
        f"User: {prompt} Assistant:"
    )


def _r1_chat(prompt: str) -> str:
    return f"<｜User｜>{prompt}<｜Assistant｜><think>\n"


TEMPLATES: dict[str, Callable[[str], str]] = {"plain": _plain, "r1_zero": _r1_zero, "r1_chat": _r1_chat}


def apply_template(template: str, prompt: str) -> str:
    """``prompt`` as the model is given it; the token that begins a text is the tokenizer's to put before it.

    Args:
        template: ``plain`` (the prompt itself), ``r1_zero`` (DeepSeek-R1, table 1) or ``r1_chat`` (the released models'
            chat form, which opens ``<think>`` for the model).
        prompt: the question.

    Raises :class:`ConfigError` for another name.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"template={template}: must be {', '.join(TEMPLATES)}")
    return TEMPLATES[template](prompt)
