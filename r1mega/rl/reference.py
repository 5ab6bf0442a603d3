"""The reference policy: a second set of weights of the same stages, put in their place for a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from r1mega.kernels.parameter import local
from r1mega.train.learner import Learner

PREFIX = "reference."


class Reference:
    """The weights (and router biases) that the policy is kept near to. It begins as the policy.

    Args:
        learner: the policy; its shards are copied, one copy more of the weights of this rank.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        saved = {name for stage in learner.stages.values() for name in stage.state_dict()}
        self._live = [(name, tensor) for name, tensor in [*learner.parameters, *learner.buffers] if name in saved]
        self._kept = [local(tensor).detach().clone() for _, tensor in self._live]

    @torch.no_grad()
    def begin(self, is_loaded: bool) -> None:
        """Once the policy has its first weights: be these, or what a checkpoint has put into :meth:`tensors`."""
        if not is_loaded:
            self.refresh()
            return
        first: dict[str, Tensor] = {}
        for (name, _), kept in zip(self._live, self._kept, strict=True):  # further copies of a tensor on this rank
            kept.copy_(first.setdefault(name, kept))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the policy's present weights."""
        for (_, live), kept in zip(self._live, self._kept, strict=True):
            kept.copy_(local(live))

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, by name; sharing memory."""
        found: dict[str, Tensor] = {}
        for (name, live), kept in zip(self._live, self._kept, strict=True):
            if isinstance(live, DTensor):
                kept = DTensor.from_local(
                    kept, live.device_mesh, live.placements, run_check=False, shape=live.shape, stride=live.stride()
                )
            found.setdefault(PREFIX + name, kept)
        return found

    @contextmanager
    def in_place_of_the_policy(self) -> Iterator[None]:
        """Inside, the stages compute with the reference's weights; forwards only. A collective call where sharded."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._learner.reshard()
        for (_, live), kept in zip(self._live, self._kept, strict=True):
            shard = local(live)
            here = shard.detach().clone()
            shard.copy_(kept)
            kept.copy_(here)
