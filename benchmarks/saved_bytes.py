"""Counts the bytes that a rank keeps for backward passes to come, by storage, so that views count once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from r1mega.pipeline.weight_gradient import WeightGradientStore


class SavedBytes:
    """Follows every tensor that autograd saves, or that deferred weight-gradient work holds, for as long as it lives.

    A storage counts from the moment it was first saved until nothing at all holds it, so what a library forgets to
    let go shows. Parameters do not count. Looks at each saved tensor anew all the time: slow, only for counting.

    Attributes:
        peak: the most bytes that lived at once since the count began.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def live(self) -> int:
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
        return sum(num_bytes for _, num_bytes in self._known.values())

    def add(self, tensor: Tensor) -> None:
        """Follow the storage of ``tensor`` from now on."""
        if isinstance(tensor, nn.Parameter):
            return
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._known[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, self.live)

    @contextmanager
    def counting(self, store: WeightGradientStore | None = None) -> Iterator[None]:
        """While inside, follow what autograd saves and what work in ``store`` holds; the peak begins anew."""
        self.peak = self.live

        def pack(tensor: Tensor) -> Tensor:
            self.add(tensor)
            return tensor.detach()  # else an output that is saved would hold its own graph, and that itself

        with torch.autograd.graph.saved_tensors_hooks(pack, _as_it_is), self._watching(store):
            yield

    @contextmanager
    def _watching(self, store: WeightGradientStore | None) -> Iterator[None]:
        if store is None:
            yield
            return
        add = store.add

        def add_and_follow(work: Callable[[], None]) -> None:
            kept = list(tensors_of(work))
            add(work)
            if any(works and works[-1] is work for works in store.pending.values()):  # it was not run at once
                for tensor in kept:
                    self.add(tensor)

        store.add = add_and_follow  # type: ignore[method-assign]
        try:
            yield
        finally:
            store.add = add  # type: ignore[method-assign]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def tensors_of(work: Callable[[], None]) -> Iterator[Tensor]:
    """The tensors that a closure or a partial holds."""
    held: tuple[Any, ...]
    if isinstance(work, functools.partial):
        held = (*work.args, *work.keywords.values())
    else:
        held = tuple(cell.cell_contents for cell in getattr(work, "__closure__", None) or ())
    yield from (value for value in held if isinstance(value, Tensor))
