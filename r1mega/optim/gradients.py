"""Gradients across layouts: the sums that are still missing after data parallelism, the global norm, clipping.

Everything follows from where a parameter is (its DTensor mesh); no parameter carries a tag.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from r1mega.optim.copies import Copies
from r1mega.parallel_state import ParallelState

NORM_BLOCK = 1024


class Gradients:
    """The gradients of all parameters of one rank.

    Args:
        parameters: names and shards, as :func:`r1mega.train.sharding.named_shards` gives them.
        state: the layout's groups.
        copies: which of them other stages hold, too; None finds out, by a collective call over the world.
    """

    def __init__(
        self, parameters: Sequence[tuple[str, DTensor]], state: ParallelState, copies: Copies | None = None
    ) -> None:
        self._state, self._named = state, list(parameters)
        self._copies = Copies([name for name, _ in parameters], state) if copies is None else copies
        self._parameters = [parameter for _, parameter in parameters]
        self._whole = [parameter for parameter in self._parameters if _is_whole_on_tp(parameter)]
        self._counted = self._counted_once()

    def _counted_once(self) -> list[DTensor]:
        """The parameters that this rank adds to the norm, so that over all ranks each element is there once."""
        left_out = set() if self._state.rank_in("tp") == 0 else set(map(id, self._whole))
        first_here = {name: parameter for name, parameter in reversed(self._named)}
        return [
            parameter
            for name, parameter in self._named
            if id(parameter) not in left_out and parameter is first_here[name] and self._copies.is_first_holder(name)
        ]

    @torch.no_grad()
    def finish(self) -> None:
        """Complete the gradients that data parallelism has summed: over ``tp``, and over copies on other stages."""
        if self._state.size("tp") > 1:
            _all_reduce_together(_local_gradients(self._whole), self._state.group("tp"))
        self._copies.sum([(name, local_gradient(parameter)) for name, parameter in self._named])

    @torch.no_grad()
    def norm(self) -> float:
        """The 2-norm of the whole model's gradient, each element counted once, the same on every rank."""
        gradients = _local_gradients(self._counted)
        total = torch.zeros((), dtype=torch.float64, device=self._state.device)
        if any(gradient.numel() for gradient in gradients):
            total += _block_norms(gradients).double().square().sum()
        if self._state.layout.world_size > 1:
            dist.all_reduce(total)
        return total.sqrt().item()

    @torch.no_grad()
    def clip(self, norm: float, max_norm: float) -> None:
        """Scale all gradients in place so that their global norm, now ``norm``, is at most ``max_norm``.

        The factor is that of ``torch.nn.utils.clip_grad_norm_``: ``max_norm / (norm + 1e-6)``, at most 1.
        """
        factor = max_norm / (norm + 1e-6)
        if factor < 1.0:
            torch._foreach_mul_(_local_gradients(self._parameters), factor)


def _is_whole_on_tp(parameter: DTensor) -> bool:
    """Whether each tensor-parallel rank has the parameter whole, and so only a part of its gradient's sum."""
    names = parameter.device_mesh.mesh_dim_names or ()
    return "tp" not in names and "ep" not in names


def local_gradient(parameter: DTensor) -> Tensor:
    """This rank's shard of the gradient of ``parameter``, which must have one."""
    gradient = parameter.grad
    assert isinstance(gradient, DTensor), "every parameter has a reduced gradient, of zeros where nothing reached it"
    return gradient.to_local()


def _local_gradients(parameters: Sequence[DTensor]) -> list[Tensor]:
    return [local_gradient(parameter) for parameter in parameters]


def _block_norms(tensors: list[Tensor]) -> Tensor:
    """The 2-norms of short pieces of ``tensors``.

    One float32 sum over millions of squares is good to 1e-5 only, and differently so in each layout; sums over pieces,
    added up in float64, are good to 1e-8 at the same speed.
    """
    norms, rests = [], []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        end = flat.numel() - flat.numel() % NORM_BLOCK
        if end:
            norms.append(torch.linalg.vector_norm(flat[:end].view(-1, NORM_BLOCK), dim=1))
        if end < flat.numel():
            rests.append(flat[end:])
    if rests:
        norms.append(torch.stack(torch._foreach_norm(rests, 2)))
    return torch.cat(norms)


def _all_reduce_together(tensors: list[Tensor], group: ProcessGroup) -> None:
    """Sum tensors of one dtype in place, in one message."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])
