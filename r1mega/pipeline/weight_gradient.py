"""Weight gradients as explicit work: run inside the backward, or kept for later.

A layer that knows this store computes only the gradient of its input in its backward and hands over a closure that
adds the weight gradient to ``weight.grad``. Run at once, that is an ordinary backward (``B``). Kept under (stage,
microbatch), the backward was an ``I`` of a zero-bubble schedule and the closures are its ``W`` (arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Work = Callable[[], None]


class WeightGradientStore:
    """Weight-gradient work of one rank. Runs work at once except inside :meth:`deferred`.

    Attributes:
        pending: kept work by (stage, microbatch), in the order in which it was added. Work that is left at the end of a
            run would be a lost gradient: see :meth:`require_empty`.
    """

    def __init__(self) -> None:
        self.pending: dict[tuple[int, int], list[Work]] = {}
        self._kept: list[Work] | None = None

    def add(self, work: Work) -> None:
        """Take work from a layer's backward: run it now, or keep it while inside :meth:`deferred`."""
        if self._kept is None:
            work()
        else:
            self._kept.append(work)

    @contextmanager
    def deferred(self, stage: int, microbatch: int) -> Iterator[None]:
        """While inside, keep the work under (stage, microbatch). Raises RuntimeError if that key is pending already."""
        if (stage, microbatch) in self.pending:
            raise RuntimeError(f"weight gradients of stage {stage}, microbatch {microbatch} are pending already")
        self._kept = self.pending[stage, microbatch] = []
        try:
            yield
        finally:
            self._kept = None

    def run(self, stage: int, microbatch: int) -> None:
        """Run and forget the work kept under (stage, microbatch). Raises RuntimeError if there never was any ``I``."""
        kept = self.pending.pop((stage, microbatch), None)
        if kept is None:
            raise RuntimeError(f"no weight gradients are pending for stage {stage}, microbatch {microbatch}")
        with torch.no_grad():
            kept.reverse()
            while kept:  # each closure is dropped as soon as it ran, and the activations that it holds with it
                kept.pop()()

    def require_empty(self) -> None:
        """Raise RuntimeError if work is left: a ``W`` is missing, and gradients would be silently wrong."""
        if self.pending:
            keys = ", ".join(f"stage {stage} microbatch {microbatch}" for stage, microbatch in self.pending)
            raise RuntimeError(f"weight gradients were never computed for {keys}")
