"""Documents packed into samples of one length by megatron-core's ``GPTDataset``, in an order that never changes.

``GPTDataset`` shuffles several epochs together, so the order of *all* samples depends on how many are asked for, and a
run that is resumed with more steps would see other data. Here every epoch is a ``GPTDataset`` of its own, of exactly
one epoch: sample ``i`` is a function of (file, sequence length, seed, i) alone. The first epoch has the very order that
Megatron gives a run of one epoch with the same seed. The price: an epoch's last, incomplete sample is left out.

This module imports megatron-core (seconds); import it where data are really read.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy
from torch import Tensor
from torch.utils.data import Dataset

from r1mega.config import ConfigError
from r1mega.data.files import cached_arrays
from r1mega.data.index import read_index
from r1mega.data.megatron import quiet_import

with quiet_import():
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import (
        GPTDataset,
        GPTDatasetConfig,
        _build_document_index,
        _build_shuffle_index,
    )
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split


class Epoch(GPTDataset):
    """One epoch over one file. Only the caching differs from ``GPTDataset``, whose own can be left half-written, is
    pickled, does not notice that a file has changed, and needs rank 0 to go first."""

    def _build_document_sample_shuffle_indices(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        lengths = hashlib.sha256(self.dataset.sequence_lengths.data).hexdigest()[:24]
        key = f"order-{lengths}-s{self.config.sequence_length}-r{self.config.random_seed}"
        arrays = cached_arrays(Path(self.config.path_to_cache), key, self._build_order)
        return arrays["documents"], arrays["samples"], arrays["shuffle"]

    def _build_order(self) -> dict[str, numpy.ndarray]:
        random = numpy.random.RandomState(self.config.random_seed)
        documents = _build_document_index(self.indices, 1, random, False)
        lengths, num_tokens = self.dataset.sequence_lengths.copy(), self._get_num_tokens_per_epoch()
        samples = helpers.build_sample_idx(lengths, documents, self.config.sequence_length, 1, num_tokens)
        num_samples = samples.shape[0] - 1
        shuffle = _build_shuffle_index(num_samples, num_samples, random)
        return {"documents": documents, "samples": samples, "shuffle": shuffle}


class PackedFile(Dataset):
    """An endless dataset over ``prefix.bin``: sample ``i`` is sample ``i % samples_per_epoch`` of its epoch.

    Raises :class:`ConfigError` where the file is missing or damaged, or has not one sample.
    """

    def __init__(
        self, prefix: str, sequence_length: int, seed: int, cache_dir: Path, vocab_size: int, eod: int
    ) -> None:
        num_tokens = read_index(prefix, "data").num_tokens
        self.samples_per_epoch = (num_tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise ConfigError(f"data.sequence_length={sequence_length}: {prefix}.bin has only {num_tokens} tokens")
        self.prefix = prefix
        self._settings = {"sequence_length": sequence_length, "path_to_cache": str(cache_dir)}
        self._seed = seed
        self._tokenizer = SimpleNamespace(vocab_size=vocab_size, eod=eod, unique_identifiers={})
        self._documents = IndexedDataset(prefix)
        self.epoch = functools.lru_cache(maxsize=2)(self._build_epoch)

    def _build_epoch(self, epoch: int) -> Epoch:
        config = GPTDatasetConfig(
            random_seed=(self._seed + epoch) % 2**32,
            blend=([self.prefix], None),
            split="1",
            tokenizer=self._tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            **self._settings,
        )
        indices = numpy.arange(len(self._documents), dtype=numpy.int32)
        dataset = Epoch(self._documents, self.prefix, indices, None, Split.train, config)
        assert len(dataset) == self.samples_per_epoch
        return dataset

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, sample = divmod(index, self.samples_per_epoch)
        return self.epoch(epoch)[sample]


def blend_order(weights: list[float], num_samples: int) -> dict[str, numpy.ndarray]:
    """Which file each sample comes from (``file``, int16) and its number there (``sample``, int64).

    Megatron's rule: always the file that lags furthest behind its share, so a longer order begins with a shorter one.
    """
    file, sample = numpy.zeros(num_samples, numpy.int16), numpy.zeros(num_samples, numpy.int64)
    shares = numpy.array(weights, numpy.float64) / sum(weights)
    helpers.build_blending_indices(file, sample, shares, len(weights), num_samples, False)
    return {"file": file, "sample": sample}
