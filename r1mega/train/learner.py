"""The model of one rank in training: its stages, gradients and optimizer, and what a step does to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from r1mega.config import Config
from r1mega.kernels.parameter import local
from r1mega.model.blocks import list_blocks
from r1mega.model.huggingface import load_huggingface
from r1mega.model.init import initialize
from r1mega.moe.balance import named_routers, update_router_bias
from r1mega.optim.adamw import AdamW
from r1mega.optim.copies import Copies
from r1mega.optim.gradients import Gradients
from r1mega.optim.schedule import learning_rate
from r1mega.parallel_state import ParallelState
from r1mega.train.checkpoint import Progress, load
from r1mega.train.schedule import build_table, num_microbatches
from r1mega.train.sharding import named_shards, reshard
from r1mega.train.stages import build_executor, build_stages


class TrainingError(RuntimeError):
    """The run cannot go on. Raised on all ranks; the message is one line, fit to be shown to a user as it is."""


class Learner:
    """What is trained, whatever the objective. Building it is a collective call.

    Args:
        config: the job.
        state: the layout's groups.
    """

    def __init__(self, config: Config, state: ParallelState) -> None:
        self.config, self.state = config, state
        blocks = list_blocks(config.model, config.data.sequence_length)
        self.table = build_table(config.parallel, num_microbatches(config, state.size("dp")), blocks)
        self.stages = build_stages(config, state, self.table)
        self.parameters = named_shards(self.stages.values())
        self.buffers = [named for stage in self.stages.values() for named in stage.named_buffers()]
        self.optimizer = AdamW(self.parameters, config.optimizer)
        self.routers = named_routers(self.stages.values())
        self.copies = Copies([name for name, _ in [*self.parameters, *self.routers]], state)
        self.gradients = Gradients(self.parameters, state, self.copies)
        self.executor = build_executor(self.table, self.stages, state)

    def begin(self, checkpoint: Path | None, more: dict[str, Tensor] | None = None) -> Progress:
        """Go on from ``checkpoint``, of which ``more`` tensors are filled, too; or begin with the first weights.

        These are those of ``model.checkpoint``, or random.
        """
        config = self.config
        for stage in self.stages.values():
            if checkpoint is None and config.model.checkpoint is not None:
                load_huggingface(stage, config.model, config.model.checkpoint)
            else:
                initialize(stage, config.model, config.train.seed)
        return Progress(0, 0) if checkpoint is None else self._load(checkpoint, more or {})

    def update(self, number: int, microbatches: Sequence[object]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Optimizer step ``number``.

        Returns:
            This rank's metrics of the microbatches; gradient norm and learning rate.

        Raises:
            TrainingError: the gradient is not finite.
        """
        optimizer = self.config.optimizer
        metrics = self.executor.run(microbatches)
        self.gradients.finish()
        norm = self.gradients.norm()
        if not math.isfinite(norm):
            raise TrainingError(f"step {number}: the gradient norm is {norm}; try a lower optimizer.learning_rate")
        if optimizer.clip_grad > 0:
            self.gradients.clip(norm, optimizer.clip_grad)
        rate = learning_rate(number, optimizer, self.config.train.num_steps)
        self.optimizer.step(rate)
        return metrics, {"grad_norm": norm, "learning_rate": rate}

    def update_router_bias(self) -> dict[str, Tensor]:
        """Move the biases of the routers towards an even load; the load of each, by name."""
        return update_router_bias(self.routers, self.state, self.copies)

    def reshard(self) -> None:
        """Free the gathered parameters after forwards without a backward."""
        for stage in self.stages.values():
            reshard(stage)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model and the optimizer."""
        return training_tensors(self.stages.values(), self.optimizer)

    def _load(self, checkpoint: Path, more: dict[str, Tensor]) -> Progress:
        progress = load(checkpoint, self.tensors() | more)
        first: dict[str, Tensor] = {}
        with torch.no_grad():  # further copies of a tensor on this rank
            for name, tensor in [*self.parameters, *self.buffers]:
                local(tensor).copy_(first.setdefault(name, local(tensor)))
        self.optimizer.copy_to_duplicates()
        self.optimizer.num_steps = progress.step
        return progress


def training_tensors(stages: Iterable[nn.Module], optimizer: AdamW) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, sharing memory with the run: parameters, saved buffers, moments."""
    found: dict[str, Tensor] = {}
    for stage in stages:
        saved = stage.state_dict()
        tensors = dict(stage.named_parameters()) | dict(stage.named_buffers())
        for name, tensor in tensors.items():
            if name in saved:
                found.setdefault(f"model.{name}", tensor.detach())
    return found | {f"optimizer.{name}": tensor for name, tensor in optimizer.state().items()}
