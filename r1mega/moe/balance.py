"""Balance without an auxiliary loss: the score bias moves towards an equal load (arXiv 2408.15664)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.config import ModelConfig
from r1mega.moe.router import Router
from r1mega.parallel_state import ParallelState

if TYPE_CHECKING:
    from r1mega.optim.copies import Copies


def named_routers(stages: Iterable[nn.Module]) -> list[tuple[str, Router]]:
    """The routers of this rank's stages by module name; a name comes twice where two stages hold a copy of it."""
    return [(name, module) for stage in stages for name, module in stage.named_modules() if isinstance(module, Router)]


def router_names(config: ModelConfig) -> list[str]:
    """The names that :func:`named_routers` gives to the routers of the whole model."""
    decoder = [f"layers.{i}.mlp.gate" for i in range(config.num_layers) if config.is_moe_layer(i)]
    mtp = range(config.num_mtp_layers) if config.moe.num_experts else ()
    return decoder + [f"mtp.{i}.layer.mlp.gate" for i in mtp]


@torch.no_grad()
def update_router_bias(
    routers: Sequence[tuple[str, Router]], state: ParallelState, copies: Copies | None = None
) -> dict[str, Tensor]:
    """Once a step: sum the load over all ranks that share the layers, move each bias, reset the counts.

    ``bias += rate * sign(mean load - load)``. The load is counted in integers, so neither the number of ranks nor the
    order of their sum changes a sign.

    Args:
        routers: of this rank, as :func:`named_routers` gives them.
        state: the process groups; collective over ``tp_dp_cp``.
        copies: which of them other stages hold, too; None where there are no copies.

    Returns:
        The step's load of each router by module name, ``[E]`` int64.
    """
    if not routers:
        return {}
    load = torch.stack([router.tokens_per_expert for _, router in routers])
    if state.size("tp_dp_cp") > 1:
        dist.all_reduce(load, group=state.group("tp_dp_cp"))
    names = [name for name, _ in routers]
    if copies is not None:
        copies.sum(list(zip(names, load.unbind(), strict=True)))
    for (_, router), counts in zip(routers, load.unbind(), strict=True):
        if router.e_score_correction_bias is not None and router.config.bias_update_rate:
            # mean - load, times E: exact in integers
            direction = (counts.sum() - counts * counts.shape[0]).sign().to(torch.float32)
            router.e_score_correction_bias.add_(direction, alpha=router.config.bias_update_rate)
        router.tokens_per_expert.zero_()
    return dict(zip(names, load.unbind(), strict=True))


def max_over_mean(load: Tensor) -> Tensor:
    """How uneven a load is: the busiest expert's tokens over the mean, 1 is even. ``[..., E] -> [...]``."""
    load = load.to(torch.float64)
    return load.amax(dim=-1) / load.mean(dim=-1)
