"""A microbatch of token sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """A microbatch of one data-parallel rank, with the counts that the losses are divided by.

    Args:
        tokens: token ids, ``[b, s]`` int64.
        labels: the token that follows each of ``tokens``, ``[b, s]`` int64; None where only logits are wanted.
        loss_mask: which labels count, ``[b, s]`` bool.
        num_loss_tokens: labels that count in the whole global batch (all microbatches of all ranks).
        num_sequences: sequences in the whole global batch.
        packed: lengths of the sequences that stand one behind the other in a row; None where a row is one sequence.
        counted: ``[b, s]`` bool, the tokens that are no padding, where the load of the experts is to leave it out.
        experts: choices of experts to keep or to repeat (``r1mega.moe.replay.ExpertRecord``).
        cache: a step of generation, ``r1mega.model.cache.PromptStep`` or ``DecodeStep``; None in training.
        head: what the last stage does with the normalised hidden states in place of the prediction of labels:
            ``head(hidden [tokens / tp, H], lm_head, group) -> StageOutput``.
    """

    tokens: Tensor
    labels: Tensor | None
    loss_mask: Tensor | None
    num_loss_tokens: int
    num_sequences: int
    packed: list[int] | None = None
    counted: Tensor | None = None
    experts: Any = None
    cache: Any = None
    head: Callable[..., Any] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on ``device``; the copy is asynchronous where memory is pinned."""
        tensors = {name: getattr(self, name) for name in ("tokens", "labels", "loss_mask", "counted")}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(self, **moved)
