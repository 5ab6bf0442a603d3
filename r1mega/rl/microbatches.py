"""Samples made into microbatches, padded or packed, and what the last stage does with them.

Shapes: b rows, s positions, T = b * s tokens of a microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.data.batch import Batch
from r1mega.kernels.policy_head import policy_log_probs
from r1mega.moe.replay import NO_RECORD, ExpertRecord, ReplayError
from r1mega.pipeline.executor import StageOutput
from r1mega.rl.loss_head import grpo_loss_from_hidden
from r1mega.rl.options import LossOptions
from r1mega.rl.samples import Sample
from r1mega.tensor_parallel.collectives import gather_tokens
from r1mega.tensor_parallel.layers import Linear


@dataclass
class Form:
    """How microbatches are made.

    Args:
        pack: one row with a sequence behind the other; else a row each, padded to the longest.
        multiple: lengths of rows are a multiple of this, which the tensor-parallel size divides.
        dtype: of log-probabilities.
        device: where the tensors go.
    """

    pack: bool
    multiple: int
    dtype: torch.dtype
    device: torch.device


class Microbatch:
    """Samples as one :class:`Batch`, with the place of each sample's tokens in it.

    Position i of a sample predicts its token i + 1, so N positions from the last one of the prompt on are those of the
    completion.
    """

    def __init__(self, samples: Sequence[Sample], form: Form) -> None:
        self.samples = list(samples)
        lengths = [sample.num_inputs for sample in samples]
        if form.pack:
            total = sum(lengths)
            total += -total % form.multiple
            self.shape, starts = (1, total), [sum(lengths[:i]) for i in range(len(lengths))]
        else:
            longest = max(lengths)
            longest += -longest % form.multiple
            self.shape, starts = (len(lengths), longest), [i * longest for i in range(len(lengths))]
        self._starts, self._form = starts, form
        self._packed = None
        if form.pack:
            rest = self.shape[1] - sum(lengths)
            self._packed = lengths + [rest] * (rest > 0)
        first = [start + len(sample.prompt) - 1 for start, sample in zip(starts, samples, strict=True)]
        self._places = torch.cat(
            [torch.arange(at, at + len(sample.tokens)) for at, sample in zip(first, samples, strict=True)]
        )

    def batch(self, head: Head, replayed_layers: Sequence[int]) -> Batch:
        """For the executor: ``head`` is called with the last stage's hidden states.

        Args:
            head: :class:`ObjectiveHead` or :class:`LogProbHead`.
            replayed_layers: force the experts of the rollout in these layers; none records nothing.
        """
        size = self.shape[0] * self.shape[1]
        tokens, counted = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool)
        for start, sample in zip(self._starts, self.samples, strict=True):
            tokens[start : start + sample.num_inputs] = torch.tensor([*sample.prompt, *sample.tokens][:-1])
            counted[start : start + sample.num_inputs] = True
        experts = self._experts(replayed_layers) if replayed_layers else None
        batch = Batch(
            tokens.view(self.shape),
            labels=None,
            loss_mask=None,
            num_loss_tokens=1,
            num_sequences=len(self.samples),
            packed=self._packed,
            counted=counted.view(self.shape),
            experts=experts,
            head=head,
        )
        return batch.to(self._form.device)

    def _experts(self, layers: Sequence[int]) -> ExpertRecord:
        choices = {}
        for layer in layers:
            rows = [_recorded(sample, layer) for sample in self.samples]
            whole = rows[0].new_full((self.shape[0] * self.shape[1], rows[0].shape[1]), NO_RECORD)
            for start, part in zip(self._starts, rows, strict=True):
                whole[start : start + len(part)] = part
            choices[layer] = whole
        return ExpertRecord(choices)

    def targets(self) -> Tensor:
        """``[b, s]`` int64: the token that each position of a completion predicts, 0 elsewhere."""
        return self._scatter([torch.tensor(sample.tokens) for sample in self.samples], torch.int64)

    def mask(self, in_loss_only: bool) -> Tensor:
        """``[b, s]`` bool: the positions that predict tokens of completions (of those in the loss)."""
        kept = [torch.full((len(s.tokens),), s.in_loss or not in_loss_only) for s in self.samples]
        return self._scatter(kept, torch.bool)

    def by_token(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """``[b, s]`` of an attribute of the samples, a number or ``[N]``; None where they have none."""
        values = [getattr(sample, name) for sample in self.samples]
        if values[0] is None:
            return None
        if not isinstance(values[0], Tensor):
            pairs = zip(values, self.samples, strict=True)
            values = [torch.full((len(sample.tokens),), value, dtype=dtype) for value, sample in pairs]
        return self._scatter(values, dtype)

    def sequences(self) -> Tensor | None:
        """``[b, s]`` int64, the sample that each position is of, where rows are packed."""
        if self._packed is None:
            return None
        ids = torch.repeat_interleave(torch.arange(len(self._packed)), torch.tensor(self._packed))
        return ids.view(self.shape).to(self._form.device)

    def zeros(self) -> Tensor:
        """``[T]``, in the type of log-probabilities."""
        return torch.zeros(self.shape[0] * self.shape[1], dtype=self._form.dtype, device=self._form.device)

    def split(self, values_T: Tensor) -> list[Tensor]:
        """``[T]`` by position, cut into ``[N]`` of each sample."""
        return list(values_T.flatten().cpu()[self._places].split([len(sample.tokens) for sample in self.samples]))

    def _scatter(self, values: list[Tensor], dtype: torch.dtype) -> Tensor:
        whole = torch.zeros(self.shape[0] * self.shape[1], dtype=dtype)
        whole[self._places] = torch.cat(values).to(dtype)
        return whole.view(self.shape).to(self._form.device)


def _recorded(sample: Sample, layer: int) -> Tensor:
    """The experts of a sample's tokens in ``layer``. Raises :class:`ReplayError` where any is missing."""
    rows = sample.experts.get(layer)
    if rows is None:
        raise ReplayError(f"layer {layer}: the rollout recorded no expert choices for it")
    if rows.shape[0] != sample.num_inputs or bool((rows < 0).any()):
        known = int((rows >= 0).all(dim=1).sum())
        raise ReplayError(f"layer {layer}: expert choices of {known} tokens were recorded, not of {sample.num_inputs}")
    return rows


class Head:
    """What the last stage does with the hidden states of one microbatch."""

    def __call__(self, hidden_TH: Tensor, lm_head: Linear, group: ProcessGroup) -> StageOutput:
        raise NotImplementedError


class LogProbHead(Head):
    """Keeps the log-probabilities ``[T]`` of the completions' tokens, 0 at all other positions."""

    def __init__(self, microbatch: Microbatch, temperature: float) -> None:
        self._microbatch, self._temperature = microbatch, temperature
        self.log_probs: Tensor | None = None

    def __call__(self, hidden_TH: Tensor, lm_head: Linear, group: ProcessGroup) -> StageOutput:
        hidden, microbatch = gather_tokens(hidden_TH, group), self._microbatch
        targets, mask = microbatch.targets().flatten(), microbatch.mask(in_loss_only=False).flatten()
        found = policy_log_probs(
            hidden, lm_head.weight, targets, mask_T=mask, temperature=self._temperature, group=group
        )
        self.log_probs = found[0]
        return StageOutput()


class ObjectiveHead(Head):
    """The loss of one microbatch, and its metrics (:func:`r1mega.rl.loss_metrics.loss_metrics`) for later.

    Args:
        microbatch: whose.
        options: the objective.
        temperature: of the log-probabilities.
        normalizer: of the whole global batch, as :func:`r1mega.rl.loss.token_weights` wants it.
    """

    def __init__(self, microbatch: Microbatch, options: LossOptions, temperature: float, normalizer: float) -> None:
        self._microbatch, self._options = microbatch, options
        self._temperature, self._normalizer = temperature, normalizer
        self.metrics: dict[str, Tensor] | None = None

    def __call__(self, hidden_TH: Tensor, lm_head: Linear, group: ProcessGroup) -> StageOutput:
        microbatch = self._microbatch
        hidden = gather_tokens(hidden_TH, group)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        advantages = microbatch.by_token("advantage", dtype)
        assert advantages is not None
        loss, metrics = grpo_loss_from_hidden(
            hidden, lm_head.weight, microbatch.targets(),
            microbatch.by_token("old_log_probs", dtype), microbatch.by_token("ref_log_probs", dtype),
            advantages, microbatch.mask(in_loss_only=True), self._options,
            normalizer=self._normalizer, rollout_log_probs=microbatch.by_token("rollout_log_probs", dtype),
            sequences=microbatch.sequences(), temperature=self._temperature, group=group,
            store=lm_head.weight_gradients,
        )  # fmt: skip
        self.metrics = metrics if group.rank() == 0 else {}
        return StageOutput((), (loss,))
