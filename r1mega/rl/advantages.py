"""Advantages from the rewards of a group: the completions of one prompt, compared with each other (no value model).

Shapes: P prompts (groups), G completions of each. A group must be whole; the P of different ranks have nothing to do
with each other, so each rank can do its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r1mega.rl.options import AdvantageOptions

__all__ = ["AdvantageOptions", "GroupAdvantages", "Selection", "group_advantages", "reward_metrics", "select_groups"]


@dataclass
class GroupAdvantages:
    """What :func:`group_advantages` finds.

    Args:
        advantages: ``[P, G]``.
        mean: ``[P]``, of the rewards.
        std: ``[P]``, of the rewards, with the divisor of the options; 0 where ``flat``.
        flat: ``[P]`` bool: all rewards of the group are equal (zero variance), so it teaches nothing.
    """

    advantages: Tensor
    mean: Tensor
    std: Tensor
    flat: Tensor


def group_advantages(rewards: Tensor, options: AdvantageOptions | None = None) -> GroupAdvantages:
    """Compare each completion with its group (GRPO, arXiv 2402.03300, section 4.1.2).

    A flat group has advantages of exactly 0, whatever ``epsilon`` is and however its mean rounds (in TRL rounding is
    left, divided by 1e-4). So has a group of one, whose mean is itself; verl gives it its bare reward.

    Args:
        rewards: ``[P, G]``; computed in float64.
        options: :class:`AdvantageOptions` of its defaults if None.

    Returns:
        The advantages and what they come from, in the floating dtype of ``rewards`` (float32 for integers).

    Raises:
        ValueError: ``rewards`` is not ``[P, G]``, or has a NaN or infinity, which would spoil its whole group.
    """
    options = options or AdvantageOptions()
    if rewards.dim() != 2 or not rewards.shape[1]:
        raise ValueError(f"rewards is {list(rewards.shape)}: must be [prompts, completions of each]")
    if not bool(rewards.isfinite().all()):
        raise ValueError("rewards: must be finite")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    exact = rewards.to(torch.float64)
    flat = (exact == exact[:, :1]).all(dim=1)
    mean = exact.mean(dim=1)
    centred = (exact - mean[:, None]).masked_fill(flat[:, None], 0)
    divisor = rewards.shape[1] - (options.std_divisor == "n-1")
    std = (centred.square().sum(dim=1) / max(divisor, 1)).sqrt()
    advantages = centred
    if options.divide_by_std:
        # A flat group is 0 / (0 + epsilon), and must not be 0 / 0.
        advantages = centred / (std + options.epsilon).masked_fill(flat, 1)[:, None]
    return GroupAdvantages(advantages.to(dtype), mean.to(dtype), std.to(dtype), flat)


def reward_metrics(found: GroupAdvantages) -> dict[str, Tensor]:
    """Sums over groups, which add up over ranks: ``num_groups``, ``flat_groups``, ``reward`` and ``reward_std``.

    Divided by ``num_groups`` the last two are the mean reward and the mean spread within a group.
    """
    count = torch.tensor(found.flat.numel(), dtype=torch.float64, device=found.flat.device)
    sums = {"flat_groups": found.flat, "reward": found.mean, "reward_std": found.std}
    return {"num_groups": count} | {name: value.sum(dtype=torch.float64) for name, value in sums.items()}


@dataclass
class Selection:
    """What :func:`select_groups` keeps.

    Args:
        kept: indices of groups, ascending.
        missing: how many more are needed.
    """

    kept: list[int]
    missing: int


def select_groups(flat: Sequence[bool] | Tensor, needed: int) -> Selection:
    """Dynamic sampling (DAPO, arXiv 2503.14476): the first ``needed`` groups that are not flat.

    While some are missing the caller generates for the next prompts and asks again with all groups so far; what is
    kept depends on the order of the prompts alone, so not on the layout, nor on who was first to finish.

    Args:
        flat: ``[P]``, of all groups so far in the order of their prompts.
        needed: groups for one step.
    """
    values = flat.tolist() if isinstance(flat, Tensor) else flat
    kept = [index for index, is_flat in enumerate(values) if not is_flat][:needed]
    return Selection(kept, needed - len(kept))
