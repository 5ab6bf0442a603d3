"""The loop of :mod:`r1mega.kernels.policy_head` over chunks of tokens: results, and gradients where they are wanted.

Shapes: T tokens, H hidden, V this rank's part of the vocabulary, C tokens of a chunk, K of them with a gradient that is
not zero, P parts of the vocabulary (ranks).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.collectives import all_gather
from r1mega.kernels import native, policy_tile
from r1mega.kernels.fake import is_fake
from r1mega.kernels.parameter import local
from r1mega.kernels.policy_tile import RowGradients

Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Of a tile of logits. Smaller ones stay in a CPU's cache, but each chunk reads the weight and its gradient anew.
TILE_BYTES, TILE_BYTES_OF_GPU = 1 << 25, 1 << 30
SMALLEST_CHUNK, SMALLEST_PART = 16, 64


@dataclass
class Chunks:
    """One call: what it is given, and the gradients that :meth:`run` makes.

    Args:
        weight_VH: this rank's part, detached.
        targets_T: ids of the whole vocabulary.
        mask_T: which tokens count; None for all.
        scale: 1 / temperature.
        group: ranks that hold the other parts; None where there are none.
        size: tokens of a chunk.
        for_hidden: whether the gradient of the hidden states is wanted.
        for_weight: whether that of the weight is.
        grad_hidden: ``[T, H]`` in the type of the hidden states, this part's share.
        grad_weight: ``[V, H]``, float32 or wider.
    """

    weight_VH: Tensor
    targets_T: Tensor
    mask_T: Tensor | None
    scale: float
    group: ProcessGroup | None
    size: int
    for_hidden: bool = False
    for_weight: bool = False
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None

    @classmethod
    def of(
        cls,
        hidden_TH: Tensor,
        weight: Tensor,
        targets_T: Tensor,
        mask_T: Tensor | None,
        temperature: float,
        group: ProcessGroup | None,
        chunk: int | None,
    ) -> Chunks:
        """The arguments of ``policy_head``. Raises ValueError if they do not fit."""
        weight_VH = local(weight).detach()
        _check(hidden_TH, weight_VH, targets_T, mask_T, temperature, chunk)
        group = None if group is None or group.size() == 1 else group
        num_tokens, vocab = len(targets_T), weight_VH.shape[0]
        if not is_fake(hidden_TH):
            _check_targets(targets_T, mask_T, vocab * (1 if group is None else group.size()))
        size = default_chunk(vocab, hidden_TH) if chunk is None else chunk
        return cls(weight_VH, targets_T, mask_T, 1.0 / temperature, group, max(1, min(size, num_tokens)))

    @property
    def wide(self) -> torch.dtype:
        """The type of logits, results and sums."""
        return torch.promote_types(self.weight_VH.dtype, torch.float32)

    def run(self, hidden_TH: Tensor, losses: Losses | None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log-probabilities ``[T]`` and entropy ``[T]``; makes the gradients that are wanted."""
        hidden_TH = hidden_TH.detach()
        loss = hidden_TH.new_zeros((), dtype=self.wide)
        log_probs_T, entropy_T = loss.new_zeros(len(hidden_TH)), loss.new_zeros(len(hidden_TH))
        if self.for_hidden:
            self.grad_hidden = torch.zeros_like(hidden_TH, memory_format=torch.contiguous_format)
        if not is_fake(hidden_TH):
            rows_T, whole = self._rows()
            shape = self.size, self.weight_VH.shape[0]
            tile = native.empty(shape, loss) if loss.is_cpu else loss.new_empty(shape)
            for start in range(0, len(rows_T), self.size):
                rows_C = rows_T[start : start + self.size]
                hidden_CH = hidden_TH[start : start + self.size] if whole else hidden_TH.index_select(0, rows_C)
                chunk_loss, log_probs_T[rows_C], entropy_T[rows_C] = self._run_chunk(tile, hidden_CH, rows_C, losses)
                loss = loss + chunk_loss
        if self.for_weight and self.grad_weight is None:
            self.grad_weight = torch.zeros_like(self.weight_VH, dtype=self.wide)
        return loss, log_probs_T, entropy_T

    def _rows(self) -> tuple[Tensor, bool]:
        """Tokens that count, and whether they are all. On a GPU the host waits for their number."""
        num_tokens = len(self.targets_T)
        if self.mask_T is not None:
            rows_T = self.mask_T.nonzero().squeeze(1)
            if len(rows_T) < num_tokens:
                return rows_T, False
        return torch.arange(num_tokens, device=self.targets_T.device), True

    def _run_chunk(
        self, tile: Tensor, hidden_CH: Tensor, rows_C: Tensor, losses: Losses | None
    ) -> tuple[Tensor | float, Tensor, Tensor]:
        logits_CV = tile[: len(rows_C)]
        policy_tile.multiply(hidden_CH, self.weight_VH, logits_CV)
        targets_C = self._local_targets(rows_C)
        log_probs_C, entropy_C, lse_C = policy_tile.merge(
            self._of_all_parts(policy_tile.statistics(logits_CV, targets_C, self.scale))
        )
        if losses is None:
            return 0.0, log_probs_C, entropy_C
        wanted = self.for_hidden or self.for_weight
        loss, gradients = differentiate(losses, log_probs_C, entropy_C, rows_C, wanted)
        if gradients is not None:
            rows = RowGradients(None, targets_C, lse_C, entropy_C, *gradients)
            self._add_gradients(logits_CV, hidden_CH, rows_C, rows)
        return loss, log_probs_C, entropy_C

    def _local_targets(self, rows_C: Tensor) -> Tensor:
        """Ids in this rank's part; -1 for those of other ranks."""
        targets_C = self.targets_T[rows_C]
        if self.group is None:
            return targets_C
        vocab = self.weight_VH.shape[0]
        targets_C = targets_C - self.group.rank() * vocab
        return targets_C.masked_fill_((targets_C < 0) | (targets_C >= vocab), -1)

    def _of_all_parts(self, statistics_C4: Tensor) -> Tensor:
        """``[P, C, 4]``, the same on all ranks."""
        if self.group is None:
            return statistics_C4.unsqueeze(0)
        return all_gather(statistics_C4, self.group).unflatten(0, (self.group.size(), -1))

    def _add_gradients(self, logits_CV: Tensor, hidden_CH: Tensor, rows_C: Tensor, rows: RowGradients) -> None:
        rows = rows.not_zero()
        if len(rows.targets_K) == 0:
            return
        if rows.rows_K is not None:
            hidden_CH, rows_C = hidden_CH.index_select(0, rows.rows_K), rows_C[rows.rows_K]
        dtype = policy_tile.gradient_dtype(self.weight_VH, self.wide)
        grad_KV = policy_tile.gradient(logits_CV, rows, self.scale, dtype)
        if self.grad_hidden is not None:
            self.grad_hidden.index_copy_(0, rows_C, policy_tile.hidden_gradient(grad_KV, self.weight_VH))
        if self.for_weight:
            self.grad_weight = policy_tile.add_weight_gradient(self.grad_weight, grad_KV, hidden_CH, self.wide)


def default_chunk(vocab: int, hidden_TH: Tensor) -> int:
    """Tokens whose logits are a tile of at most 32 MiB, and an eighth of all logits, on a CPU; of 1 GiB on a GPU.

    Args:
        vocab: this rank's part.
        hidden_TH: tells number of tokens, type and device.
    """
    bytes_each = max(hidden_TH.element_size(), 4) * max(vocab, 1)
    if hidden_TH.is_cuda:
        return max(SMALLEST_CHUNK, TILE_BYTES_OF_GPU // bytes_each)
    return max(SMALLEST_CHUNK, min(TILE_BYTES // bytes_each, max(len(hidden_TH) // 8, SMALLEST_PART)))


def differentiate(
    losses: Losses, log_probs_R: Tensor, entropy_R: Tensor, rows_R: Tensor, wanted: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The sum of ``losses``, and its gradients by log-probabilities and entropy; None if not wanted or all zero."""
    with torch.set_grad_enabled(wanted):
        inputs = log_probs_R.detach().requires_grad_(wanted), entropy_R.detach().requires_grad_(wanted)
        values_R = losses(*inputs, rows_R)
        if values_R.shape != rows_R.shape:
            raise ValueError(f"losses returned {[*values_R.shape]}: must be one number for each of {len(rows_R)} rows")
        total = values_R.sum()
    if not total.requires_grad:
        return total.detach(), None
    by_log_prob, by_entropy = torch.autograd.grad(total, inputs, materialize_grads=True)
    return total.detach(), (by_log_prob, by_entropy)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, chunk: int | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {[*hidden.shape]} and weight {[*weight.shape]}: must be [T, H] and [V, H]")
    if hidden.dtype != weight.dtype or weight.dtype not in DTYPES:
        raise ValueError(f"hidden {hidden.dtype}, weight {weight.dtype}: must both be float32, float64 or bfloat16")
    for name, given, dtype in (("targets", targets, torch.int64), ("mask", mask, torch.bool)):
        if given is not None and (given.shape != hidden.shape[:1] or given.dtype != dtype):
            raise ValueError(f"{name} {[*given.shape]} {given.dtype}: must be [{hidden.shape[0]}], as hidden, {dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1, or None")


def _check_targets(targets_T: Tensor, mask_T: Tensor | None, vocab: int) -> None:
    fits_T = (targets_T >= 0) & (targets_T < vocab)
    if mask_T is not None:
        fits_T |= ~mask_T
    if targets_T.is_cuda:
        torch._assert_async(fits_T.all())
    elif not fits_T.all():
        worst = int(targets_T[~fits_T][0])
        raise ValueError(f"target {worst}: must be from 0 to {vocab - 1}, the ids of the vocabulary")
