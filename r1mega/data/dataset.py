"""The samples of a run: one Megatron file, a weighted blend of several, or demonstrations."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from torch import Tensor
from torch.utils.data import Dataset

from r1mega.config import ConfigError
from r1mega.data.demonstrations import DemonstrationDataset, are_demonstrations, read_examples
from r1mega.data.files import cached_arrays
from r1mega.data.index import cache_folder, parse_blend

if TYPE_CHECKING:
    from r1mega.data.packing import PackedFile
    from r1mega.data.tokenizer import Tokenizer


class TokenDataset(Dataset):
    """``num_samples`` samples ``{"tokens": [s], "labels": [s], "loss_mask": [s], ...}`` (int64, int64, float32).

    Sample ``i`` does not depend on ``num_samples``: a longer dataset begins with the shorter one.
    """

    every_label_counts = True

    def __init__(self, files: list[PackedFile], order: dict[str, numpy.ndarray] | None, num_samples: int) -> None:
        assert order is not None or len(files) == 1
        self.files = files
        self._order = order
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of a dataset of {self._num_samples}")
        if self._order is None:
            return self.files[0][index]
        return self.files[self._order["file"][index]][int(self._order["sample"][index])]


def build_dataset(
    blend: list[str],
    sequence_length: int,
    num_samples: int,
    seed: int,
    cache_dir: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> TokenDataset | DemonstrationDataset:
    """Build a dataset of ``num_samples`` samples of ``sequence_length`` tokens.

    Documents are packed as Megatron packs them (end to end, in shuffled order, samples shuffled once more); of
    demonstrations, each is a sample (:mod:`r1mega.data.demonstrations`). Files are read for as many epochs as it takes,
    each in its own order. Every process may call it, with torch.distributed or without: one builds the sample order,
    the others wait for the file.

    Args:
        blend: prefixes of ``.bin/.idx`` files, each may follow its weight; without weights, files are mixed in
            proportion to their sizes. Or ``.jsonl`` files of demonstrations.
        sequence_length: tokens of a sample.
        num_samples: length of the dataset.
        seed: decides the order; epoch ``e`` of a file uses ``seed + e``.
        cache_dir: where the order is kept; None is ``cache`` beside the first file.
        tokenizer: what the documents were encoded with; demonstrations are encoded with it.

    Raises:
        ConfigError: a file is missing, damaged or too short, or the cache cannot be written.
    """
    pairs = parse_blend(blend, "data")
    folder = cache_folder([prefix for prefix, _ in pairs], cache_dir)
    if are_demonstrations(blend, "data"):
        assert tokenizer is not None
        return _build_demonstrations(blend, sequence_length, num_samples, seed, folder, tokenizer)
    from r1mega.data.packing import PackedFile, blend_order

    vocab_size, eod = (tokenizer.vocab_size, tokenizer.eos_id) if tokenizer is not None else (2**31, 0)
    try:
        files = [PackedFile(prefix, sequence_length, seed, folder, vocab_size, eod) for prefix, _ in pairs]
        weights = [file.samples_per_epoch if w is None else w for file, (_, w) in zip(files, pairs, strict=True)]
        if len(files) == 1:
            order, needed = None, [num_samples]
        else:
            name = hashlib.sha256(repr(weights).encode()).hexdigest()[:24]
            key = f"blend-{name}-n{num_samples}"
            order = cached_arrays(folder, key, lambda: blend_order(weights, num_samples))
            needed = numpy.bincount(order["file"], minlength=len(files)).tolist()
        for file, count in zip(files, needed, strict=True):
            # Now rather than in the middle of the run, where a full disk would cost more.
            for epoch in range(-(-count // file.samples_per_epoch)):
                file.epoch(epoch)
    except OSError as error:
        raise _unusable(folder, error) from error
    return TokenDataset(files, order, num_samples)


def _build_demonstrations(
    paths: list[str], sequence_length: int, num_samples: int, seed: int, folder: Path, tokenizer: Tokenizer
) -> DemonstrationDataset:
    try:
        files = [read_examples(path, tokenizer, folder, "data") for path in paths]
    except OSError as error:
        raise _unusable(folder, error) from error
    for examples in files:
        examples.check_lengths(sequence_length)
    return DemonstrationDataset(files, sequence_length, num_samples, seed, tokenizer.eos_id)


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"data.cache_dir={folder}: cannot be used ({error.strerror or error}); name another folder")
