"""TRL's own GRPO code on given numbers: a trainer whose model, sampler and rewards are replaced by tensors."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Rollout:
    """Numbers in place of a model; float64, and what TRL makes float32 of is exact in it.

    Args:
        current: ``[B, L]`` log-probabilities of the policy in training.
        old: ``[B, L]``.
        ref: ``[B, L]``.
        sampled: ``[B, L]``, of the rollout engine.
        entropy: ``[B, L]``.
        mask: ``[B, L]`` bool; each row's True positions may have holes (TRL's tool mask), the rest is padding.
        rewards: ``[B]``, groups of ``group`` rows.
        group: completions a prompt.
    """

    current: Tensor
    old: Tensor
    ref: Tensor
    sampled: Tensor
    entropy: Tensor
    mask: Tensor
    rewards: Tensor
    group: int


def make_rollout(seed: int = 0, groups: int = 3, group: int = 5, length: int = 7, spread: float = 0.6) -> Rollout:
    """Random numbers with ratios well outside of the clip range, rows of many lengths with holes, one flat group.

    Groups of 5: TRL takes G / (G - 1) in float32, and 5 / 4 is exact there.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(groups * group, length, generator=generator).double()

    current = -1.5 + 0.5 * noise()
    old, ref = current + spread * noise(), current + spread * noise()
    sampled = (old + spread * noise()).float().double()
    lengths = torch.randint(2, length + 1, (groups * group,), generator=generator)
    lengths[::group] = length
    mask = torch.arange(length) < lengths[:, None]
    mask &= torch.rand(groups * group, length, generator=generator) < 0.9
    mask[:, 0] = mask[::group, -1] = True
    rewards = torch.randn(groups * group, generator=generator).double()
    rewards[:group] = 0.5
    return Rollout(current, old, ref, sampled, noise().exp(), mask, rewards, group)


def make_trainer(**settings: Any) -> Any:
    """A ``GRPOTrainer`` that has the attributes its loss reads, and nothing else.

    Args:
        settings: attributes of the trainer and of its ``args`` (set on both), with TRL's names.
    """
    from trl import GRPOTrainer

    arguments = {
        "beta": 0.0,
        "delta": None,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "use_bias_correction_kl": False,
        "scale_rewards": "group",
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": 2.0,
        "entropy_coef": 0.0,
        "max_completion_length": 11,
        "current_gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "mask_truncated_completions": False,
    } | settings
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    fixed = {
        "multi_objective_aggregation": "sum_then_normalize",
        "num_iterations": 2,
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_adaptive_entropy": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": arguments["entropy_coef"] != 0,
        "reward_weights": torch.ones(1, dtype=torch.float64),
        "reward_funcs": ["given"],
        "reward_func_names": ["given"],
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "pad_to_multiple_of": None,
        "eos_token_ids": [0],
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_metrics": {"train": defaultdict(list)},
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
    }
    for name, value in {**arguments, **fixed}.items():
        setattr(trainer, name, value)
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing_kwargs": None}
    trainer.args = SimpleNamespace(**arguments, **sizes, report_to=[])
    trainer.state = SimpleNamespace(global_step=0)
    trainer.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trainer.ref_model = SimpleNamespace()
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        is_main_process=True,
        sync_gradients=True,
        gather=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )
    return trainer


def prepare(trainer: Any, rollout: Rollout) -> dict[str, Any]:
    """TRL's inputs of a rollout: its own masks, advantages and importance ratios from the given numbers."""
    lengths = [int(row.nonzero().max()) + 1 for row in rollout.mask]
    inside = [row[:length].long() for row, length in zip(rollout.mask, lengths, strict=True)]
    sampled = [row[:length].tolist() for row, length in zip(rollout.sampled, lengths, strict=True)]
    ids = [[5] * length for length in lengths]

    def generate(prompts: list[str]) -> tuple:
        return [[7]] * len(ids), ids, [row.tolist() for row in inside], ids, sampled, {}, None, None

    def log_probs(model: object, *args: Any, **kwargs: Any) -> tuple:
        return (rollout.ref if model is trainer.ref_model else rollout.old), None, None

    trainer._generate = generate
    trainer._get_per_token_logps_and_entropies = log_probs
    trainer._calculate_rewards = lambda *args: rollout.rewards[:, None]
    trainer.num_generations = rollout.group
    return trainer._generate_and_score_completions([{"prompt": "?"}] * len(ids))


def loss_and_gradient(trainer: Any, inputs: dict[str, Any], rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's loss, and its gradients in the log-probabilities and in the entropy."""
    current = rollout.current.clone().requires_grad_()
    entropy = rollout.entropy.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (current, entropy, None)
    loss = trainer._compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(loss, [current, entropy], allow_unused=True, materialize_grads=True)
    return loss.detach(), gradients[0], gradients[1]
