"""Demonstrations for supervised fine-tuning: prompts, each with the completion to imitate, one JSON object a line.

``{"prompt": "47+85=", "completion": "<think>...</think> <answer>132</answer>"}``; other keys are ignored. A prompt is
encoded with the tokenizer's begin token, if it has one, and a completion with its end-of-document token; apart from
each other, so that the tokens of a prompt are those that a rollout of the same prompt begins with. The loss is on the
completion and its end token alone. One example is one sample, padded on the right.

The file is encoded once, into the folder that also keeps the order of other data, and memory-mapped from there. This
module imports no torch until a sample is read, so that files can be checked before anything starts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from r1mega.config import ConfigError, DataConfig
from r1mega.data.files import cached_arrays
from r1mega.data.index import parse_blend

if TYPE_CHECKING:
    from torch import Tensor

    from r1mega.data.tokenizer import Tokenizer

SUFFIX = ".jsonl"
_SECONDS_BETWEEN_REPORTS = 5.0


def are_demonstrations(blend: list[str], name: str) -> bool:
    """Whether the entries of the field ``name`` are files of demonstrations; False where there are none.

    Several files are read as one; a file that is named twice counts twice.

    Raises :class:`ConfigError` where only some of them are, or where they have weights.
    """
    kinds = {entry.endswith(SUFFIX) for entry, _ in parse_blend(blend, name)}
    if len(kinds) == 2:
        raise ConfigError(f"{name}={blend}: either all are demonstrations ({SUFFIX}) or none is")
    if True in kinds and any(weight is not None for _, weight in parse_blend(blend, name)):
        raise ConfigError(
            f"{name}={blend}: demonstrations have no weights; name a file twice to read it twice as often"
        )
    return True in kinds


def check_entries(data: DataConfig) -> None:
    """Refuse settings with anything but demonstrations to train on. Raises :class:`ConfigError`."""
    if not are_demonstrations(data.train, "data.train"):
        raise ConfigError(
            f"data.train={data.train}: must be files of demonstrations ({SUFFIX}); other data are for r1mega pretrain"
        )


@dataclass(frozen=True)
class Examples:
    """The n examples of a file.

    Attributes:
        path: the file.
        tokens: of all examples, prompt and completion, one behind the other, int32.
        ends: where each example ends in ``tokens``, ``[n]`` int64.
        prompts: tokens of each prompt, ``[n]`` int64.
        lines: the line of each example in the file, ``[n]`` int64.
    """

    path: str
    tokens: numpy.ndarray
    ends: numpy.ndarray
    prompts: numpy.ndarray
    lines: numpy.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def check_lengths(self, sequence_length: int) -> None:
        """Refuse a file with examples that do not fit into a sample of ``sequence_length`` tokens.

        They are not dropped or cut: without its longest examples a model learns to think less, and without their ends
        it learns not to stop, and neither could be seen in the loss.
        """
        needed = numpy.diff(self.ends, prepend=0) - 1  # the last token is a label only
        if not (too_long := int((needed > sequence_length).sum())):
            return
        longest = int(needed.argmax())
        are = "example is" if too_long == 1 else "examples are"
        raise ConfigError(
            f"data.sequence_length={sequence_length}: {too_long:,} of {len(self):,} {are} too long in {self.path}; "
            f"the longest (line {self.lines[longest]}) needs {needed[longest]}: raise it to that, or take them out"
        )


def read_examples(path: str, tokenizer: Tokenizer, folder: Path, name: str) -> Examples:
    """Encode ``path``, or find it encoded in ``folder``; of several processes one does the work.

    Raises:
        ConfigError: the field ``name``, the file, and the line that is no demonstration.
        OSError: ``folder`` cannot be written.
    """
    digest = hashlib.sha256(b"demonstrations 1\n")
    try:
        for file in (Path(path), tokenizer.path):
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise ConfigError(f"{name}={path}: {error.filename} cannot be read: {error.strerror}") from error
    key = f"demonstrations-{digest.hexdigest()[:24]}"
    return Examples(path, **cached_arrays(folder, key, lambda: _encode(path, tokenizer, name)))


def _encode(path: str, tokenizer: Tokenizer, name: str) -> dict[str, numpy.ndarray]:
    tokens: list[numpy.ndarray] = []
    columns: dict[str, list[int]] = {"ends": [], "prompts": [], "lines": []}
    size, done, end, last = max(1, Path(path).stat().st_size), 0, 0, time.monotonic()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            done += len(line)
            if not line.strip():
                continue
            prompt, completion = _parse(line, f"{name}={path}: line {number}")
            start = tokenizer.encode(prompt, bos=True)
            ids = start + tokenizer.encode(completion, eos=True)
            tokens.append(numpy.array(ids, numpy.int32))
            end += len(ids)
            for column, value in zip(columns.values(), (end, len(start), number), strict=True):
                column.append(value)
            if (now := time.monotonic()) - last > _SECONDS_BETWEEN_REPORTS:
                last = now
                print(f"r1mega: encoding {path}: {done / size:4.0%}, {end:,} tokens", flush=True)
    if not tokens:
        raise ConfigError(f"{name}={path}: holds no demonstrations")
    arrays = {column: numpy.array(values, numpy.int64) for column, values in columns.items()}
    return {"tokens": numpy.concatenate(tokens), **arrays}


def _parse(line: bytes, where: str) -> tuple[str, str]:
    """Prompt and completion of a line. Raises :class:`ConfigError` that begins with ``where``."""
    try:
        example = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON") from error
    if not isinstance(example, dict):
        raise ConfigError(f'{where} must be an object with "prompt" and "completion"')
    for key in ("prompt", "completion"):
        text = example.get(key)
        if not isinstance(text, str) or not text:
            raise ConfigError(f'{where} must have "{key}", a text that is not empty')
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f'{where}: its "{key}" is not Unicode text (a lone surrogate)')
    return example["prompt"], example["completion"]


class DemonstrationDataset:
    """``num_samples`` samples of ``sequence_length`` tokens, for as many epochs as it takes.

    A sample is ``{"tokens", "labels": [s] int64, "loss_mask", "counted": [s] bool}``; ``counted`` is false at the
    padding. Each epoch has every example once, in an order that is a function of (seed, epoch) alone.

    Args:
        files: the examples, all of them short enough.
        sequence_length: s.
        num_samples: length of the dataset.
        seed: decides the order.
        padding: token id behind the examples.
    """

    def __init__(
        self, files: Sequence[Examples], sequence_length: int, num_samples: int, seed: int, padding: int
    ) -> None:
        self.files, self.sequence_length = files, sequence_length
        self._num_samples, self._seed, self._padding = num_samples, seed, padding
        self._ends = numpy.cumsum([len(examples) for examples in files])  # of the files, in examples
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        import torch

        examples, row = self._find(index)
        end, prompt = int(examples.ends[row]), int(examples.prompts[row])
        start = int(examples.ends[row - 1]) if row else 0
        ids = torch.full((self.sequence_length + 1,), self._padding, dtype=torch.int64)
        ids[: end - start] = torch.from_numpy(examples.tokens[start:end].astype(numpy.int64))
        place = torch.arange(self.sequence_length)
        counted = place < end - start - 1
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": counted & (place >= prompt - 1), "counted": counted}

    def num_loss_tokens(self, index: int) -> int:
        """Labels of sample ``index`` that count."""
        examples, row = self._find(index)
        start = int(examples.ends[row - 1]) if row else 0
        return int(examples.ends[row]) - start - max(int(examples.prompts[row]), 1)

    def _find(self, index: int) -> tuple[Examples, int]:
        """The file of sample ``index`` and the number of the example in it."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of a dataset of {self._num_samples}")
        epoch, place = divmod(index, int(self._ends[-1]))
        example = int(self._order(epoch)[place])
        file = int(numpy.searchsorted(self._ends, example, side="right"))
        return self.files[file], example - (int(self._ends[file - 1]) if file else 0)

    def _shuffle(self, epoch: int) -> numpy.ndarray:
        # RandomState, because numpy keeps what it draws the same in all versions.
        seed = [self._seed % 2**32, self._seed // 2**32, epoch]
        return numpy.random.RandomState(seed).permutation(int(self._ends[-1]))
