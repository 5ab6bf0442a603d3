"""Expert choices that a rollout has made, repeated in training (rollout routing replay, arXiv 2510.11370).

Two engines, or one engine with two batch sizes, round differently, and about a tenth of a large model's router
decisions differ between the rollout and the training of the same token. Here the rollout's experts are forced in
training; their weights are computed from the live logits, so the router still learns.

A record travels with its microbatch and is read by the global index of the layer. No schedule and no recomputation can
give it to another microbatch, because nothing depends on the order in which layers ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

NO_RECORD = -1


class ReplayError(RuntimeError):
    """A record of expert choices is missing, is left over, or does not fit."""


class ExpertRecord:
    """The experts of one microbatch's tokens in some layers.

    Without ``choices`` it is to be filled: each layer keeps what its router chooses. With them each layer repeats them.

    Args:
        choices: ``[T, K]`` int16 by global layer, of all tokens of the microbatch; rows of ``NO_RECORD`` (padding) are
            left to the live router.
    """

    def __init__(self, choices: Mapping[int, Tensor] | None = None) -> None:
        self.is_filled = choices is not None
        self.choices: dict[int, Tensor] = dict(choices or {})
        self.agreement: dict[int, Tensor] = {}  # [2]: choices that the live router made as well, and all
        self._used: set[int] = set()

    def layer(self, layer: int) -> LayerRecord:
        """What layer ``layer`` repeats or keeps."""
        return LayerRecord(self, layer)

    def require_used(self, layers: Iterable[int]) -> None:
        """Raises :class:`ReplayError` unless every record of these layers was repeated, and no other is there."""
        unused = sorted(set(self.choices) - self._used)
        if unused:
            raise ReplayError(f"the expert choices of layers {unused} were recorded but not used")
        missing = sorted(set(layers) - self._used)
        if missing:
            raise ReplayError(f"layers {missing} repeated no expert choices")


class LayerRecord:
    """One layer's side of an :class:`ExpertRecord`."""

    def __init__(self, record: ExpertRecord, layer: int) -> None:
        self._record, self._layer = record, layer
        self.is_filled = record.is_filled

    def replace(self, live_TK: Tensor, first: int) -> Tensor | None:
        """The experts to use instead of ``live_TK``; None keeps the live ones, and keeps them in mind.

        Args:
            live_TK: ``[t, K]`` int64, what the router chooses now for tokens ``first`` to ``first + t``.
            first: the first of these tokens in the microbatch.
        """
        record, layer = self._record, self._layer
        if not record.is_filled:
            record.choices[layer] = live_TK.to(torch.int16)
            return None
        if layer not in record.choices:
            raise ReplayError(f"layer {layer}: no expert choices were recorded, only those of {sorted(record.choices)}")
        choices = record.choices[layer]
        if choices.shape[1] != live_TK.shape[1] or choices.shape[0] < first + live_TK.shape[0]:
            wanted = f"tokens {first} to {first + live_TK.shape[0]} with {live_TK.shape[1]} each"
            raise ReplayError(
                f"layer {layer}: {list(choices.shape)} expert choices were recorded, not those of {wanted}"
            )
        recorded = choices[first : first + live_TK.shape[0]].to(live_TK.device, torch.int64)
        is_recorded = recorded >= 0
        same = (live_TK.unsqueeze(2) == recorded.unsqueeze(1)).any(dim=1) & is_recorded
        record.agreement[layer] = torch.stack([same.sum(), is_recorded.sum()])
        record._used.add(layer)
        return torch.where(is_recorded, recorded, live_TK)
