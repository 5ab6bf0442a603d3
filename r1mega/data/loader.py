"""Who gets which sample: the microbatches of a data-parallel rank, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from r1mega.config import ConfigError
from r1mega.data.batch import Batch

NAMES = ("tokens", "labels", "loss_mask", "counted")


class SampleDataset(Protocol):
    """A dataset of samples ``{"tokens": [s], "labels": [s], "loss_mask": [s]}``, with ``"counted": [s]`` if padded.

    Where an attribute ``every_label_counts`` is there and true, or a method ``num_loss_tokens(index)``, no mask is ever
    read to count the labels.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


class StepLoader:
    """Cuts a dataset into global batches, these into the ranks' slices, and these into microbatches.

    Sample ``j`` of step ``i`` is ``dataset[i * global_batch_size + j]``, whatever the layout; data-parallel rank ``r``
    takes the ``r``-th contiguous slice. The next step is read in a thread while the current one is computed.

    Args:
        dataset: the samples, in order.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
        global_batch_size: sequences of a step, over all ranks.
        microbatch_size: sequences of one :class:`Batch`.
        prefetch: read the next step ahead.

    Raises :class:`ConfigError` where the global batch cannot be cut evenly.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int,
        microbatch_size: int,
        prefetch: bool = True,
    ) -> None:
        if global_batch_size % (dp_size * microbatch_size) != 0:
            raise ConfigError(
                f"train.global_batch_size={global_batch_size}: must be a multiple of data-parallel size x "
                f"train.microbatch_size ({dp_size} x {microbatch_size})"
            )
        assert 0 <= dp_rank < dp_size
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.microbatch_size = microbatch_size
        self.num_local = global_batch_size // dp_size
        self.first_local = dp_rank * self.num_local
        self._thread = ThreadPoolExecutor(1, "data") if prefetch else None
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def __len__(self) -> int:
        """Whole steps in the dataset."""
        return len(self.dataset) // self.global_batch_size

    def step(self, index: int) -> list[Batch]:
        """This rank's microbatches of step ``index``. Raises IndexError behind the end of the dataset."""
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of a dataset of {len(self)} steps")
        future = self._ahead.pop(index, None)
        batches = future.result() if future is not None else self._read(index)
        if self._thread is not None and index + 1 < len(self):
            self._ahead = {index + 1: self._thread.submit(self._read, index + 1)}
        return batches

    def close(self) -> None:
        """End the reading thread; reading on is possible, without a thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._ahead = None, {}

    def _read(self, index: int) -> list[Batch]:
        start = index * self.global_batch_size
        local = range(start + self.first_local, start + self.first_local + self.num_local)
        samples = [self.dataset[i] for i in local]
        num_loss_tokens = self._count_loss_tokens(start, local, samples)
        size = self.microbatch_size
        return [self._batch(samples[i : i + size], num_loss_tokens) for i in range(0, self.num_local, size)]

    def _batch(self, samples: list[Mapping[str, Tensor]], num_loss_tokens: int) -> Batch:
        tensors = {name: torch.stack([sample[name] for sample in samples]) for name in NAMES if name in samples[0]}
        return Batch(
            tokens=tensors["tokens"],
            labels=tensors["labels"],
            loss_mask=tensors["loss_mask"].bool(),
            num_loss_tokens=num_loss_tokens,
            num_sequences=self.global_batch_size,
            counted=tensors.get("counted"),
        )

    def _count_loss_tokens(self, start: int, local: range, samples: list[Mapping[str, Tensor]]) -> int:
        """Labels that count in the global batch: without communication, so every rank reads the others' masks."""
        if getattr(self.dataset, "every_label_counts", False):
            return self.global_batch_size * samples[0]["labels"].numel()
        everyone = range(start, start + self.global_batch_size)
        if (count := getattr(self.dataset, "num_loss_tokens", None)) is not None:
            return sum(count(i) for i in everyone)
        masks = (samples[i - local.start] if i in local else self.dataset[i] for i in everyone)
        return sum(int(sample["loss_mask"].bool().sum()) for sample in masks)
