"""Balance without an auxiliary loss: the score bias moves towards an equal load (arXiv 2408.15664)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.moe.router import Router
from r1mega.parallel_state import ParallelState


@torch.no_grad()
def update_router_bias(stage: nn.Module, state: ParallelState) -> dict[str, Tensor]:
    """Once a step: sum the load over all ranks that share the layers, move each bias, reset the counts.

    ``bias += rate * sign(mean load - load)``. The load is counted in integers, so neither the number of ranks nor the
    order of their sum changes a sign.

    Args:
        stage: the layers of one pipeline stage.
        state: the process groups; collective over ``tp_dp_cp``.

    Returns:
        The step's load of each router by module name, ``[E]`` int64.
    """
    routers: dict[str, Router] = {n: module for n, module in stage.named_modules() if isinstance(module, Router)}
    if not routers:
        return {}
    load = torch.stack([router.tokens_per_expert for router in routers.values()])
    if state.size("tp_dp_cp") > 1:
        dist.all_reduce(load, group=state.group("tp_dp_cp"))
    for router, counts in zip(routers.values(), load.unbind(), strict=True):
        if router.e_score_correction_bias is not None and router.config.bias_update_rate:
            # mean - load, times E: exact in integers
            direction = (counts.sum() - counts * counts.shape[0]).sign().to(torch.float32)
            router.e_score_correction_bias.add_(direction, alpha=router.config.bias_update_rate)
        router.tokens_per_expert.zero_()
    return dict(zip(routers, load.unbind(), strict=True))


def max_over_mean(load: Tensor) -> Tensor:
    """How uneven a load is: the busiest expert's tokens over the mean, 1 is even. ``[..., E] -> [...]``."""
    load = load.to(torch.float64)
    return load.amax(dim=-1) / load.mean(dim=-1)
