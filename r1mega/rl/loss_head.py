"""The GRPO objective straight from hidden states and the head's weight: ``r1mega.kernels.policy_head`` and ``rl.loss``.

A plain function of tensors, for a pipeline's last stage and for other stacks. B rows, L positions, T = B * L tokens, H
hidden, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.kernels.parameter import WeightGradients
from r1mega.kernels.policy_head import policy_head, policy_log_probs
from r1mega.rl.loss import (
    LossOptions,
    TokenObjective,
    correction_weights,
    loss_metrics,
    sequence_log_ratios,
    token_weights,
)


def grpo_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    options: LossOptions | None = None,
    *,
    normalizer: float | Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    sequences: Tensor | None = None,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    chunk: int | None = None,
    store: WeightGradients | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``grpo_loss`` of the log-probabilities that ``hidden @ weight.T / temperature`` gives to ``targets``.

    Loss, metrics and gradients are those of ``r1mega.rl.loss.grpo_loss`` after ``log_softmax``, without the ``[T, V]``
    logits: three matrix products, for the tokens in ``mask`` alone, and two of them only for those with a gradient.
    What needs whole sequences before any token has a gradient (``ratio="sequence"`` with old log-probabilities; a
    ``correction`` without them) takes a fourth product, since all log-probabilities come first.

    Args:
        hidden: ``[B, L, H]`` or ``[T, H]``: ``hidden[t]`` predicts ``targets[t]``, so the caller has shifted them. Over
            tensor-parallel ranks the same on each; the gradient is then this rank's share, to be summed over them
            (``gather_tokens`` and Megatron's column-parallel collectives do that in their backward).
        weight: ``[V, H]``, the head's parameter (or the tied embedding's); see ``policy_head`` for its gradient.
        targets: ``[B, L]`` int64 ids of the whole vocabulary; anything where ``mask`` is False.
        old_log_probs: ``[B, L]``, at the same temperature; None: the policy itself (ratio 1).
        ref_log_probs: ``[B, L]``, at the same temperature; None only with ``kl_coefficient=0``.
        advantages: ``[B]`` or ``[B, L]``.
        mask: ``[B, L]`` bool, True at the tokens of completions that count.
        options: the objective; ``LossOptions`` of its defaults if None.
        normalizer: of the whole global batch, see ``grpo_loss``.
        rollout_log_probs: ``[B, L]``, as the engine that sampled reported them; needed for ``correction``.
        sequences: ``[B, L]`` int64 for packed rows, see ``grpo_loss``.
        temperature: at which the completions were sampled.
        group: the tensor-parallel group.
        chunk: tokens at a time; None chooses.
        store: where the weight gradient goes; None returns it to autograd.

    Returns:
        The loss, and metrics as ``loss_metrics`` has them, with ``entropy``; the same on all ranks of ``group``.

    Raises:
        ValueError: for shapes that do not fit, or a tensor that the options need and that is missing.
    """
    options = options or LossOptions()
    mask = mask.to(torch.bool)
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1).expand(-1, mask.shape[1])
    given = {"targets": targets, "old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs}
    given |= {"advantages": advantages, "rollout_log_probs": rollout_log_probs, "sequences": sequences}
    for name, value in given.items():
        if value is not None and value.shape != mask.shape:
            raise ValueError(f"{name} is {list(value.shape)}, where mask is {list(mask.shape)}")
    if options.kl_coefficient and ref_log_probs is None:
        raise ValueError(f"kl_coefficient={options.kl_coefficient}: needs ref_log_probs; 0 is without a reference")
    if options.correction != "none" and rollout_log_probs is None:
        raise ValueError(f"correction={options.correction}: needs rollout_log_probs")
    if hidden.dim() > 2:
        hidden = hidden.flatten(0, -2)
    head: dict[str, Any] = {"mask_T": mask.flatten(), "temperature": temperature, "group": group, "chunk": chunk}
    wide = torch.promote_types(hidden.dtype, torch.float32)

    def widen(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(wide)

    old, ref, rollout = widen(old_log_probs), widen(ref_log_probs), widen(rollout_log_probs)
    advantages = advantages.detach().to(wide)
    by_sequence = options.ratio == "sequence" and old is not None
    before = old
    log_ratios = correction = None
    if by_sequence or (options.correction != "none" and old is None):
        first = policy_log_probs(hidden, weight, targets.flatten(), **head)[0].view_as(mask)
        before = first if old is None else old
        log_ratios = sequence_log_ratios(first, before, mask, sequences) if by_sequence else None
    if options.correction != "none":
        assert before is not None and rollout is not None
        correction = correction_weights(before, rollout, mask, options, sequences)
    weights = token_weights(mask, options, normalizer, sequences, wide)
    objective = TokenObjective(options, advantages, weights, old, ref, correction, log_ratios)
    found = policy_head(hidden, weight, targets.flatten(), objective, **head, store=store)
    metrics = loss_metrics(
        found.log_probs_T.view_as(mask), old, ref, advantages, mask, options, entropy=found.entropy_T.view_as(mask),
        correction=correction, sequence_log_ratios=log_ratios, rollout_log_probs=rollout,
    )  # fmt: skip
    return found.loss, metrics
