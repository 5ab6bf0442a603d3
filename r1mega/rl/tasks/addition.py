"""Addition with the carries written out: the smallest task on which reinforcement learning can be seen to work.

A prompt is ``47+85=``; a completion adds column by column, from the right, each with its carry, and then answers::

    <think>7+5=12,4+8+1=13</think> <answer>132</answer>

The demonstrations are spoiled on purpose. Many have a slip (in a column's sum, with which the rest goes on, or in
a digit of the answer), and many lack one of the tags. A model that imitates them is right in each single place more
often than not, so its most likely completion is right and its samples mostly are not: what reinforcement learning can
sharpen. Some slips in a column are noticed (``7+5=11,wait,7+5=12``), so that there is reflection to be rewarded.

Everything is a function of the settings alone: ``random.random()`` is the only source of chance, because Python keeps
its sequence the same in all versions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError, require
from r1mega.data.files import whole_folder

PROMPTS, EVALUATION, DEMONSTRATIONS, RECORD = "prompts.jsonl", "evaluation.jsonl", "demonstrations.jsonl", "task.json"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WAIT = "wait"
EOS, UNKNOWN = "<eos>", "<unk>"
SYMBOLS = (EOS, UNKNOWN, *TAGS, WAIT, *"0123456789", *"+=, ")
_MOST_DIGITS = 12


def _setting(default: Any, explained: str) -> Any:
    return field(default=default, metadata={"help": explained})


@dataclass(frozen=True)
class AdditionTask:
    """How the files are made; each field says what it is. Raises :class:`ConfigError` where a value does not fit."""

    num_digits: int = _setting(2, "digits of each of the two numbers; the first is not 0")
    num_prompts: int = _setting(7844, "prompts to train on, all different; there are 8,100 of two digits")
    num_evaluation: int = _setting(256, "further prompts, which are held out")
    num_demonstrations: int = _setting(20_000, "demonstrations; of prompts to train on, drawn at random")
    wrong_answer: float = _setting(0.7, "share of the demonstrations with a slip, in a column or in the answer")
    broken_format: float = _setting(0.25, "share of the demonstrations that lack a tag, right or wrong")
    recheck: float = _setting(0.05, "share of the demonstrations with a slip that is noticed and mended at once")
    seed: int = _setting(1234, "decides the prompts and the demonstrations")

    def __post_init__(self) -> None:
        require(1 <= self.num_digits <= _MOST_DIGITS, "num_digits", self.num_digits, f"must be 1 to {_MOST_DIGITS}")
        for name in ("num_prompts", "num_evaluation", "num_demonstrations"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("wrong_answer", "broken_format", "recheck"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be a share between 0 and 1")
        there, needed = (9 * 10 ** (self.num_digits - 1)) ** 2, self.num_prompts + self.num_evaluation
        what_fits = f"with num_evaluation ({self.num_evaluation}) must be at most {there:,}, as many as there are"
        require(needed <= there, "num_prompts", self.num_prompts, what_fits)


@dataclass(frozen=True)
class Written:
    """The files of a folder. ``is_new``: made by this call, not found."""

    folder: Path
    is_new: bool

    @property
    def prompts(self) -> Path:
        return self.folder / PROMPTS

    @property
    def evaluation(self) -> Path:
        return self.folder / EVALUATION

    @property
    def demonstrations(self) -> Path:
        return self.folder / DEMONSTRATIONS


def write_addition(folder: str | Path, task: AdditionTask | None = None) -> Written:
    """Write the task into ``folder``, which appears under its name when it is complete.

    It holds ``prompts.jsonl`` and ``evaluation.jsonl`` (``{"prompt", "reference"}``), ``demonstrations.jsonl``
    (``{"prompt", "completion"}``), a tokenizer (the folder itself is a value for ``data.tokenizer``) and ``task.json``
    (the settings). Where it is there already, made with the same settings, nothing is done.

    Raises :class:`ConfigError` where the folder holds something else, or cannot be written.
    """
    task, folder = task or AdditionTask(), Path(folder)
    record = json.dumps(asdict(task), indent=1) + "\n"
    try:
        with whole_folder(folder) as partial:
            if partial is not None:
                for name, text in _files(task).items():
                    (partial / name).write_text(text, encoding="utf-8")
                (partial / RECORD).write_text(record, encoding="utf-8")
        found = (folder / RECORD).read_text(encoding="utf-8") if (folder / RECORD).is_file() else None
    except OSError as error:
        raise ConfigError(f"output={folder}: cannot be written: {error.strerror}") from error
    if found != record:
        how = "not made by this command" if found is None else "made with other settings"
        raise ConfigError(f"output={folder}: is there already, {how}; name another folder")
    return Written(folder, is_new=partial is not None)


def _files(task: AdditionTask) -> dict[str, str]:
    """Text by file name."""
    train, held_out = draw_pairs(task)
    questions = {PROMPTS: train, EVALUATION: held_out}
    lines: dict[str, Iterator[dict]] = {
        name: ({"prompt": prompt(a, b), "reference": str(a + b)} for a, b in pairs) for name, pairs in questions.items()
    }
    lines[DEMONSTRATIONS] = demonstrations(task, train)
    files = {name: "".join(json.dumps(line) + "\n" for line in rows) for name, rows in lines.items()}
    return files | tokenizer_files()


def prompt(a: int, b: int) -> str:
    """The question for ``a + b``."""
    return f"{a}+{b}="


def draw_pairs(task: AdditionTask) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Pairs of numbers to train on, and others that are held out; a function of the numbers and the seed."""
    chance, least = random.Random(f"pairs {task.seed}"), 10 ** (task.num_digits - 1)
    count, needed = 9 * least, task.num_prompts + task.num_evaluation
    if count**2 <= 1_000_000:
        # Few enough to list, so that all of them can be asked for.
        found = _shuffled([(least + i // count, least + i % count) for i in range(count**2)], chance)
    else:
        drawn: dict[tuple[int, int], None] = {}
        while len(drawn) < needed:
            drawn[least + _below(count, chance), least + _below(count, chance)] = None
        found = list(drawn)
    return found[task.num_evaluation : needed], found[: task.num_evaluation]


def demonstrations(task: AdditionTask, pairs: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
    """``{"prompt", "completion"}`` for pairs drawn from ``pairs``, spoiled as the task says."""
    chance = random.Random(f"demonstrations {task.seed}")
    # Every place has the same risk, whatever went wrong before: then a model that imitates is right as often as the
    # demonstrations are, whether or not it sees that they have gone well so far.
    slip = 1 - (1 - task.wrong_answer) ** (1 / (task.num_digits + 1))
    for _ in range(task.num_demonstrations):
        a, b = pairs[_below(len(pairs), chance)]
        mended = _below(task.num_digits, chance) if chance.random() < task.recheck else None
        text = completion(a, b, chance, slip, mended)
        if chance.random() < task.broken_format:
            text = text.replace(TAGS[_below(len(TAGS), chance)], "")
        yield {"prompt": prompt(a, b), "completion": text}


def completion(a: int, b: int, chance: random.Random, slip: float = 0.0, mended: int | None = None) -> str:
    """A completion for ``a + b``.

    Args:
        a: a number.
        b: another of as many digits.
        chance: where slips come from.
        slip: how likely a slip is in each column, and in the answer.
        mended: the column (0 is the rightmost) with a slip that is noticed and mended.
    """
    steps, answer, carry, total = [], "", 0, 0
    for column, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        total = int(x) + int(y) + carry
        terms = f"{x}+{y}+{carry}" if carry else f"{x}+{y}"
        if column == mended:
            steps += [f"{terms}={_other_than(total, 20, chance)}", WAIT]
        if chance.random() < slip:
            total = _other_than(total, 20, chance)
        steps.append(f"{terms}={total}")
        carry, digit = divmod(total, 10)
        answer = f"{digit}{answer}"
    answer = answer if not carry else f"{carry}{answer}"
    if chance.random() < slip:
        place = _below(len(answer), chance)
        answer = f"{answer[:place]}{_other_than(int(answer[place]), 10, chance)}{answer[place + 1 :]}"
    return f"<think>{','.join(steps)}</think> <answer>{answer}</answer>"


def _below(limit: int, chance: random.Random) -> int:
    """A number from 0 to ``limit`` - 1."""
    return int(chance.random() * limit)


def _other_than(number: int, limit: int, chance: random.Random) -> int:
    """A number from 0 to ``limit`` - 1 that is not ``number``."""
    other = _below(limit - 1, chance)
    return other + (other >= number)


def _shuffled(items: list, chance: random.Random) -> list:
    items = list(items)
    for i in range(len(items) - 1, 0, -1):
        j = _below(i + 1, chance)
        items[i], items[j] = items[j], items[i]
    return items


def tokenizer_files() -> dict[str, str]:
    """``tokenizer.json`` and ``tokenizer_config.json``: one token a digit, a sign or a tag; written out, not trained.

    A byte-pair model without merges: every character is a token. What is not in the vocabulary becomes ``<unk>``.
    """
    vocabulary = {symbol: index for index, symbol in enumerate(SYMBOLS)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": index, "content": symbol, **flags, "special": symbol in (EOS, UNKNOWN)}
        for symbol, index in vocabulary.items()
        if len(symbol) > 1
    ]
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": UNKNOWN, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    tokenizer: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    tokenizer |= {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Fuse"}}
    tokenizer["model"] = model | {"vocab": vocabulary, "merges": []}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "unk_token": UNKNOWN}
    texts = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    return {name: json.dumps(content, indent=1) + "\n" for name, content in texts.items()}
