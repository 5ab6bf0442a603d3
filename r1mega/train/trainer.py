"""Everything one rank needs to train: stages, optimizer, data, checkpoints; and one step of it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.config import Config
from r1mega.data.dataset import build_dataset
from r1mega.data.loader import StepLoader
from r1mega.data.tokenizer import Tokenizer
from r1mega.kernels.parameter import local
from r1mega.model.blocks import list_blocks
from r1mega.model.huggingface import load_huggingface
from r1mega.model.init import initialize
from r1mega.moe.balance import max_over_mean, named_routers, router_names, update_router_bias
from r1mega.optim.adamw import AdamW
from r1mega.optim.copies import Copies
from r1mega.optim.gradients import Gradients
from r1mega.optim.schedule import learning_rate
from r1mega.parallel_state import ParallelState
from r1mega.train.checkpoint import Checkpointer, Progress, load
from r1mega.train.metrics import LOAD_PREFIX
from r1mega.train.run_folder import CHECKPOINT_FOLDER
from r1mega.train.schedule import build_table, num_microbatches
from r1mega.train.sharding import named_shards, reshard
from r1mega.train.stages import build_executor, build_stages

LOAD_STEPS = 20


class TrainingError(RuntimeError):
    """The run cannot go on. Raised on all ranks; the message is one line, fit to be shown to a user as it is."""


class Trainer:
    """One rank's part of a training run. Building it is a collective call.

    Args:
        config: the job.
        state: the layout's groups.
        checkpoint: where to go on from; None begins at the beginning.
    """

    def __init__(self, config: Config, state: ParallelState, checkpoint: Path | None = None) -> None:
        self.config, self.state = config, state
        blocks = list_blocks(config.model, config.data.sequence_length)
        table = build_table(config.parallel, num_microbatches(config, state.size("dp")), blocks)
        self.stages = build_stages(config, state, table)
        for stage in self.stages.values():
            if checkpoint is None and config.model.checkpoint is not None:
                load_huggingface(stage, config.model, config.model.checkpoint)
            else:
                initialize(stage, config.model, config.train.seed)
        self.parameters = named_shards(self.stages.values())
        self.optimizer = AdamW(self.parameters, config.optimizer)
        self.routers = named_routers(self.stages.values())
        self.copies = Copies([name for name, _ in [*self.parameters, *self.routers]], state)
        self.gradients = Gradients(self.parameters, state, self.copies)
        self.progress = Progress(0, 0) if checkpoint is None else self._load(checkpoint)
        self.checkpointer = Checkpointer(Path(config.train.output_dir) / CHECKPOINT_FOLDER, config)
        self.executor = build_executor(table, self.stages, state)
        self.tokenizer = Tokenizer.load(config.data.tokenizer) if config.data.tokenizer is not None else None
        self.loader = self._loader(config.data.train, config.train.num_steps, prefetch=True)
        self.valid_loader = None
        if config.data.valid and config.train.valid_batches:
            self.valid_loader = self._loader(config.data.valid, config.train.valid_batches, prefetch=False)
        self.recent_loads: deque[dict[str, Tensor]] = deque(maxlen=LOAD_STEPS)
        self._metric_names = metric_names(config)
        self._router_names = router_names(config.model)

    def step(self) -> dict[str, int | float]:
        """One optimizer step; its metrics, the same on every rank. Raises :class:`TrainingError`."""
        started = time.perf_counter()
        config, number = self.config, self.progress.step + 1
        batches = [batch.to(self.state.device) for batch in self.loader.step(number - 1)]
        losses = self.executor.run(batches)
        self.gradients.finish()
        norm = self.gradients.norm()
        if not math.isfinite(norm):
            raise TrainingError(f"step {number}: the gradient norm is {norm}; try a lower optimizer.learning_rate")
        if config.optimizer.clip_grad > 0:
            self.gradients.clip(norm, config.optimizer.clip_grad)
        rate = learning_rate(number, config.optimizer, config.train.num_steps)
        self.optimizer.step(rate)
        loads = self._update_router_bias()
        tokens = config.train.global_batch_size * config.data.sequence_length
        self.progress = Progress(number, self.progress.tokens + tokens)
        metrics: dict[str, int | float] = {"step": number, "tokens": self.progress.tokens}
        metrics |= self._reduce(losses, loads)
        metrics |= {"grad_norm": norm, "learning_rate": rate}
        seconds = time.perf_counter() - started
        return metrics | {"step_seconds": seconds, "tokens_per_second": tokens / seconds}

    def validate(self) -> float | None:
        """Mean loss over the validation batches, the same on every rank; None without validation data."""
        if self.valid_loader is None:
            return None
        total = 0.0
        for index in range(self.config.train.valid_batches):
            batches = [batch.to(self.state.device) for batch in self.valid_loader.step(index)]
            total += self._sum_over_ranks([self.executor.run(batches, forward_only=True).get("loss", 0.0)])[0]
        for stage in self.stages.values():
            reshard(stage)
        return total / self.config.train.valid_batches

    def save(self) -> None:
        """Begin to write a checkpoint. Raises :class:`CheckpointError` where the one before it failed."""
        self.checkpointer.save(self.progress, training_tensors(self.stages.values(), self.optimizer))

    def close(self) -> None:
        """Wait for the last checkpoint and end the threads."""
        self.loader.close()
        self.checkpointer.finish()

    def _load(self, checkpoint: Path) -> Progress:
        progress = load(checkpoint, training_tensors(self.stages.values(), self.optimizer))
        first: dict[str, Tensor] = {}
        buffers = [named for stage in self.stages.values() for named in stage.named_buffers()]
        with torch.no_grad():  # further copies of a tensor on this rank
            for name, tensor in [*self.parameters, *buffers]:
                local(tensor).copy_(first.setdefault(name, local(tensor)))
        self.optimizer.copy_to_duplicates()
        self.optimizer.num_steps = progress.step
        return progress

    def _loader(self, blend: list[str], num_steps: int, prefetch: bool) -> StepLoader:
        data, train, state = self.config.data, self.config.train, self.state
        num_samples = num_steps * train.global_batch_size
        dataset = build_dataset(blend, data.sequence_length, num_samples, train.seed, data.cache_dir, self.tokenizer)
        return StepLoader(
            dataset, state.rank_in("dp"), state.size("dp"), train.global_batch_size, train.microbatch_size, prefetch
        )

    def _update_router_bias(self) -> dict[str, Tensor]:
        loads = update_router_bias(self.routers, self.state, self.copies)
        self.recent_loads.append(loads)
        return loads

    def _reduce(self, losses: Mapping[str, Tensor], loads: Mapping[str, Tensor]) -> dict[str, float]:
        """Losses and expert balance of the whole model, in one all-reduce with the news of a failed checkpoint."""
        ratios = {}
        if self.state.rank_in("tp_dp_cp") == 0:
            ratios = {name: max_over_mean(load) for name, load in loads.items()}
        values = [losses.get(name, 0.0) for name in self._metric_names]
        values += [ratios.get(name, 0.0) for name in self._router_names]
        values += [float(name in ratios) for name in self._router_names]  # two copies of a layer report twice
        *sums, failed = self._sum_over_ranks([*values, float(self.checkpointer.failed())])
        if failed:
            self.checkpointer.finish()
        metrics = dict(zip(self._metric_names, sums, strict=False))
        if not self._router_names:
            return metrics
        totals, counts = sums[len(metrics) :][: len(self._router_names)], sums[-len(self._router_names) :]
        triples = zip(self._router_names, totals, counts, strict=True)
        uneven = {LOAD_PREFIX + name: total / count for name, total, count in triples}
        return metrics | {"expert_load_max_over_mean": sum(uneven.values()) / len(uneven)} | uneven

    def _sum_over_ranks(self, values: Iterable[Tensor | float]) -> list[float]:
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=self.state.device) for value in values])
        if self.state.layout.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()


def metric_names(config: Config) -> list[str]:
    """The losses that a model with these settings reports."""
    moe = config.model.moe if config.model.moe.num_experts else None
    reported = {
        "loss": True,
        "mtp_loss": config.model.num_mtp_layers > 0,
        "aux_loss": moe is not None and moe.aux_loss_coefficient > 0,
        "z_loss": moe is not None and moe.z_loss_coefficient > 0,
    }
    return [name for name, is_reported in reported.items() if is_reported]


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
