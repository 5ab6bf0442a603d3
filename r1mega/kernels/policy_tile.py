"""What :mod:`r1mega.kernels.policy_head` does with one tile of logits: two passes over it and three matrix products.

The first pass reads the tile once for what its rows' log-probability and entropy need; the second writes the gradient
over it. With s = logits * scale (scale is 1 / temperature), over the whole vocabulary::

    lse = log sum_v e^(s_v)        log_prob = s_target - lse        entropy = lse - sum_v p_v s_v,  p_v = e^(s_v - lse)
    d log_prob / d logits_v = scale * ([v is the target] - p_v)
    d entropy  / d logits_v = scale * -p_v * (s_v - lse + entropy)

Where the vocabulary is cut, each rank has the statistics of its part, and :func:`merge` puts them together.

Shapes: C rows of a tile, K of them whose gradient is wanted, V this rank's part of the vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from r1mega.kernels import native, triton
from r1mega.kernels.products import add_matmul, matmul

# Rows at a time: of a bfloat16 weight that a CPU multiplies as float32; of a tile that PyTorch's operations pass over.
WEIGHT_ROWS, TILE_ROWS = 4096, 32


@dataclass
class RowGradients:
    """What the second pass needs of the K rows whose gradient is wanted.

    Args:
        rows_K: which rows of the tile they are, ascending, int64; None for all.
        targets_K: their targets in this rank's part, int64; -1 where the target is another rank's.
        lse_K: log-sum-exp over the whole vocabulary.
        entropy_K: over the whole vocabulary.
        of_log_prob_K: gradient of the loss by the log-probability.
        of_entropy_K: gradient of the loss by the entropy.
    """

    rows_K: Tensor | None
    targets_K: Tensor
    lse_K: Tensor
    entropy_K: Tensor
    of_log_prob_K: Tensor
    of_entropy_K: Tensor

    def not_zero(self) -> RowGradients:
        """Of all rows those whose gradient is not exactly zero (not a number counts). A GPU's host waits for them."""
        rows_K = ((self.of_log_prob_K != 0) | (self.of_entropy_K != 0)).nonzero().squeeze(1)
        return self if len(rows_K) == len(self.targets_K) else replace(self.chosen(rows_K), rows_K=rows_K)

    def chosen(self, which: Tensor | slice) -> RowGradients:
        """Some of them."""
        vectors = self.targets_K, self.lse_K, self.entropy_K, self.of_log_prob_K, self.of_entropy_K
        return RowGradients(None if self.rows_K is None else self.rows_K[which], *(v[which] for v in vectors))


def statistics(logits_CV: Tensor, targets_C: Tensor, scale: float) -> Tensor:
    """``[C, 4]``: the greatest s, sum of e^(s - greatest), sum of e^(s - greatest) (s - greatest), s of the target.

    Args:
        logits_CV: contiguous, float32 or float64.
        targets_C: int64 ids in this part of the vocabulary; -1 for one elsewhere, whose s counts as 0.
        scale: 1 / temperature.
    """
    if native.takes(logits_CV):
        found = torch.empty(logits_CV.shape[0], 4, dtype=logits_CV.dtype)
        native.call("policy_statistics", logits_CV, logits_CV, targets_C, scale, found, *logits_CV.shape)
        return found
    if triton.takes(logits_CV):
        return _triton().statistics(logits_CV, targets_C, scale)
    parts = zip(logits_CV.split(TILE_ROWS), targets_C.split(TILE_ROWS), strict=True)
    return torch.cat([reference_statistics(*part, scale) for part in parts])


def reference_statistics(logits_CV: Tensor, targets_C: Tensor, scale: float) -> Tensor:
    """:func:`statistics` in PyTorch's operations, which need two more tiles."""
    shifted = logits_CV * scale
    target = shifted.gather(1, targets_C.clamp(min=0).unsqueeze(1)).squeeze(1).masked_fill_(targets_C < 0, 0)
    greatest = shifted.amax(1)
    powers = shifted.sub_(greatest.unsqueeze(1)).exp()
    return torch.stack([greatest, powers.sum(1), shifted.mul_(powers).sum(1), target], 1)


def merge(statistics_RC4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, entropy and log-sum-exp of each row, ``[C]``, from the statistics of all R parts."""
    greatest_RC, sum_RC, moment_RC, target_RC = statistics_RC4.unbind(2)
    greatest = greatest_RC.amax(0)
    shift_RC = greatest_RC - greatest
    share_RC = shift_RC.exp()
    total = (sum_RC * share_RC).sum(0)
    moment = ((moment_RC + sum_RC * shift_RC) * share_RC).sum(0)
    log_total = total.log()
    return (target_RC.sum(0) - greatest) - log_total, log_total - moment / total, greatest + log_total


def gradient(logits_CV: Tensor, rows: RowGradients, scale: float, dtype: torch.dtype) -> Tensor:
    """Gradient of the loss by the logits of K rows, ``[K, V]`` of ``dtype``; ``logits_CV`` may be overwritten.

    Args:
        logits_CV: contiguous, float32 or float64.
        rows: which, and their gradients.
        scale: 1 / temperature.
        dtype: of the result.
    """
    vectors = rows.lse_K, rows.entropy_K, rows.of_log_prob_K, rows.of_entropy_K
    num_rows = len(rows.targets_K)
    if dtype == logits_CV.dtype and native.takes(logits_CV, *vectors):
        width = logits_CV.shape[1]
        native.call(
            "policy_gradient", logits_CV, logits_CV, rows.rows_K, rows.targets_K, *vectors, scale, num_rows, width
        )
        return logits_CV[:num_rows]
    if triton.takes(logits_CV, *vectors):
        in_place = dtype == logits_CV.dtype and rows.rows_K is None
        out_KV = logits_CV if in_place else logits_CV.new_empty(num_rows, logits_CV.shape[1], dtype=dtype)
        _triton().gradient(logits_CV, rows.rows_K, rows.targets_K, *vectors, scale, out_KV)
        return out_KV
    out_KV = logits_CV[:num_rows]  # a wanted row is not above its place in the result
    if dtype != logits_CV.dtype:
        out_KV = torch.empty_like(out_KV, dtype=dtype)
    for start in range(0, num_rows, TILE_ROWS):
        here = slice(start, start + TILE_ROWS)
        part = rows.chosen(here)
        logits_KV = logits_CV[here] if part.rows_K is None else logits_CV[part.rows_K]
        out_KV[here] = reference_gradient(logits_KV, part, scale)
    return out_KV


def reference_gradient(logits_KV: Tensor, rows: RowGradients, scale: float) -> Tensor:
    """:func:`gradient` in PyTorch's operations, which need two more tiles; of logits that are all wanted."""
    logs = (logits_KV * scale).sub_(rows.lse_K.unsqueeze(1))
    powers = logs.exp()
    logs.add_(rows.entropy_K.unsqueeze(1)).mul_(-scale * rows.of_entropy_K.unsqueeze(1))
    logs.sub_(scale * rows.of_log_prob_K.unsqueeze(1)).mul_(powers)
    of_target = (scale * rows.of_log_prob_K).masked_fill(rows.targets_K < 0, 0)
    return logs.scatter_add_(1, rows.targets_K.clamp(min=0).unsqueeze(1), of_target.unsqueeze(1))


def gradient_dtype(weight_VH: Tensor, wide: torch.dtype) -> torch.dtype:
    """The type in which the gradient of the logits is multiplied: a GPU's matrix units want that of the weight."""
    return weight_VH.dtype if weight_VH.is_cuda else wide


def multiply(hidden_CH: Tensor, weight_VH: Tensor, out_CV: Tensor) -> None:
    """``hidden @ weight.T`` into ``out_CV``, whose type may be wider: nothing is rounded to that of the weight."""
    if weight_VH.dtype == out_CV.dtype:
        matmul(hidden_CH, weight_VH.t(), out=out_CV)
    elif weight_VH.is_cuda:
        torch.mm(hidden_CH, weight_VH.t(), out_dtype=out_CV.dtype, out=out_CV)
    else:
        wide_CH = hidden_CH.to(out_CV.dtype)
        for start, block in _wide_blocks(weight_VH, out_CV.dtype):
            matmul(wide_CH, block.t(), out=out_CV[:, start : start + len(block)])


def hidden_gradient(grad_KV: Tensor, weight_VH: Tensor) -> Tensor:
    """``grad @ weight``, ``[K, H]`` in the type of the weight."""
    if grad_KV.dtype == weight_VH.dtype:
        return matmul(grad_KV, weight_VH)
    total = grad_KV.new_zeros(grad_KV.shape[0], weight_VH.shape[1])
    for start, block in _wide_blocks(weight_VH, grad_KV.dtype):
        add_matmul(total, grad_KV[:, start : start + len(block)], block)
    return total.to(weight_VH.dtype)


def add_weight_gradient(total_VH: Tensor | None, grad_KV: Tensor, hidden_KH: Tensor, wide: torch.dtype) -> Tensor:
    """``total + grad.T @ hidden`` in the wide type, added inside the product; a None total is one of zeros."""
    grad_VK = grad_KV.t()
    if grad_KV.dtype == wide:
        hidden_KH = hidden_KH.to(wide)
        return matmul(grad_VK, hidden_KH) if total_VH is None else add_matmul(total_VH, grad_VK, hidden_KH)
    if total_VH is None:
        return torch.mm(grad_VK, hidden_KH, out_dtype=wide)
    return torch.addmm(total_VH, grad_VK, hidden_KH, out_dtype=wide, out=total_VH)


def _wide_blocks(weight_VH: Tensor, wide: torch.dtype):
    for start in range(0, weight_VH.shape[0], WEIGHT_ROWS):
        yield start, weight_VH[start : start + WEIGHT_ROWS].to(wide)


def _triton() -> ModuleType:
    from r1mega.kernels.triton import policy_head

    return policy_head
