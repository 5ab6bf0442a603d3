"""Draws tokens: random numbers that are a function of what is drawn, and the inverse of the distribution.

A random number depends on (seed, request, sample, position) alone, so neither the layout nor the batch nor the order of
rows changes a completion. Everything is in float64: layouts round differently in the last bits of a logit, which
moves the bounds between tokens by about 1e-16 then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1mega.kernels.scratch import Scratch
from r1mega.rl.rollout.engine import Sampling

# SplitMix64 (Steele, Lea, Flood 2014, doi 10.1145/2714064.2660195): a counter times the golden ratio, then a bijection
# of 64 bits that no test of randomness tells from chance.
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 1 << 64
ELEMENTS_AT_ONCE = 1 << 24  # of the vocabulary's rows, in float64


def mixed(x: int) -> int:
    """SplitMix64's bijection of an unsigned 64-bit number."""
    x = (x ^ (x >> 30)) * FIRST % WORD
    x = (x ^ (x >> 27)) * SECOND % WORD
    return x ^ (x >> 31)


def stream(seed: int, key: int, sample: int) -> int:
    """Where the random numbers of one completion begin, as a signed 64-bit number."""
    state = 0
    for value in (seed, key, sample):
        state = mixed((state + GOLDEN + value) % WORD)
    return _signed(state)


def uniforms(streams_R: Tensor, positions_R: Tensor) -> Tensor:
    """``[R]`` float64 in [0, 1): number ``position`` of each stream.

    Args:
        streams_R: ``[R]`` int64, of :func:`stream`.
        positions_R: ``[R]`` int64, from 0.
    """
    x = streams_R + (positions_R + 1) * _signed(GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).to(torch.float64).mul_(2.0**-53)


def draw(
    logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling, num_ids: int, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens ``[R]`` int64 and their log-probabilities ``[R]`` float64 (see :class:`Completion`).

    Args:
        logits_RV: ``[R, V]``.
        uniforms_R: ``[R]`` float64 in [0, 1).
        sampling: temperature and top_p.
        num_ids: ids from here on are no tokens, and never drawn.
        scratch: holds what is computed on the way.
    """
    rows = max(1, ELEMENTS_AT_ONCE // logits_RV.shape[1])
    scratch = scratch or Scratch()
    if logits_RV.shape[0] <= rows:
        return _draw(logits_RV, uniforms_R, sampling, num_ids, scratch)
    parts = zip(logits_RV.split(rows), uniforms_R.split(rows), strict=True)
    tokens, log_probs = zip(*(_draw(*part, sampling, num_ids, scratch) for part in parts), strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _draw(
    logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling, num_ids: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    probabilities = scratch.empty("probabilities", tuple(logits_RV.shape), torch.float64, logits_RV.device)
    probabilities.copy_(logits_RV)
    if sampling.temperature not in (0, 1):
        probabilities.div_(sampling.temperature)
    torch.softmax(probabilities, dim=1, out=probabilities)
    candidates = probabilities[:, :num_ids]
    if sampling.temperature == 0:
        tokens = candidates.argmax(dim=1, keepdim=True)
    else:
        if sampling.top_p < 1:
            candidates = nucleus(candidates, sampling.top_p)
        sums = scratch.empty("sums", tuple(candidates.shape), torch.float64, logits_RV.device)
        torch.cumsum(candidates, dim=1, out=sums)
        # u is at most 1 - 2**-53, so the product is less than the last sum, and an id with probability 0 is never hit.
        tokens = torch.searchsorted(sums, uniforms_R.unsqueeze(1) * sums[:, -1:], right=True)
    return tokens.squeeze(1), probabilities.gather(1, tokens).log_().squeeze(1)


def nucleus(probabilities_RV: Tensor, top_p: float) -> Tensor:
    """``probabilities_RV`` with zeros outside the smallest set of most probable ids that sum to ``top_p`` of the total
    (arXiv 1904.09751). Of equally probable ids the lower ones are taken first."""
    ordered, ids = probabilities_RV.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(dim=1) - ordered
    kept = before < top_p * ordered.sum(dim=1, keepdim=True)
    kept[:, 0] = True
    return probabilities_RV * torch.zeros_like(kept).scatter_(1, ids, kept)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """The unsigned shift to the right of signed numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - WORD if x >= WORD // 2 else x
