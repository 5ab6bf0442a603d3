"""AdamW on the local shards of DTensor parameters: no DTensor dispatch in a step, DTensors in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from r1mega.config import OptimizerConfig
from r1mega.optim.gradients import local_gradient


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with PyTorch's fused kernel.

    Vectors (norms, biases) are not decayed. Each rank updates its shards only; nothing is communicated, so the
    gradients must be complete (summed, clipped) when :meth:`step` is called.

    Args:
        parameters: names and shards; ``grad`` has the parameter's placement.
        config: betas, eps and weight decay.
    """

    def __init__(self, parameters: Sequence[tuple[str, DTensor]], config: OptimizerConfig) -> None:
        self.config = config
        self.num_steps = 0
        groups: dict[bool, _Group] = {True: _Group(config.weight_decay), False: _Group(0.0)}
        for name, parameter in parameters:
            groups[parameter.ndim > 1].add(name, parameter)
        self._groups = list(groups.values())

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update all parameters and drop their gradients."""
        self.num_steps += 1
        for group in self._groups:
            if group.names:
                group.step(learning_rate, self.num_steps, self.config)

    def state(self) -> dict[str, DTensor]:
        """The moments as ``exp_avg.<parameter>`` and ``exp_avg_sq.<parameter>``, laid out as the parameter.

        They share memory with the optimizer: loading into them restores it, together with ``num_steps``. A name that
        is there twice (two copies on one rank) appears once; see :meth:`copy_to_duplicates`.
        """
        found: dict[str, DTensor] = {}
        for kind, name, moment, parameter in self._moments():
            found.setdefault(f"{kind}.{name}", _as_dtensor(moment, parameter))
        return found

    def copy_to_duplicates(self) -> None:
        """After loading into :meth:`state`: give the same moments to further copies of a parameter on this rank."""
        first: dict[str, Tensor] = {}
        for kind, name, moment, _ in self._moments():
            moment.copy_(first.setdefault(f"{kind}.{name}", moment))

    def _moments(self) -> Iterator[tuple[str, str, Tensor, DTensor]]:
        for group in self._groups:
            for name, parameter, first, second in zip(
                group.names, group.parameters, group.exp_avg, group.exp_avg_sq, strict=True
            ):
                yield "exp_avg", name, first, parameter
                yield "exp_avg_sq", name, second, parameter


class _Group:
    """Parameters with the same weight decay, and their moments."""

    def __init__(self, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.names: list[str] = []
        self.parameters: list[DTensor] = []
        self.exp_avg: list[Tensor] = []
        self.exp_avg_sq: list[Tensor] = []
        self.steps: list[Tensor] = []

    @torch.no_grad()
    def add(self, name: str, parameter: DTensor) -> None:
        local = parameter.to_local()
        self.names.append(name)
        self.parameters.append(parameter)
        self.exp_avg.append(torch.zeros_like(local))
        self.exp_avg_sq.append(torch.zeros_like(local))
        self.steps.append(torch.zeros((), dtype=torch.float32, device=local.device))

    def step(self, learning_rate: float, num_steps: int, config: OptimizerConfig) -> None:
        # The kernel counts by itself, one tensor a parameter; num_steps is the truth, also after a resume.
        torch._foreach_zero_(self.steps)
        torch._foreach_add_(self.steps, num_steps - 1)
        adamw(
            [parameter.to_local() for parameter in self.parameters],
            [local_gradient(parameter) for parameter in self.parameters],
            self.exp_avg,
            self.exp_avg_sq,
            [],
            self.steps,
            fused=True,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=config.eps,
            maximize=False,
        )
        for parameter in self.parameters:
            parameter.grad = None


def _as_dtensor(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
