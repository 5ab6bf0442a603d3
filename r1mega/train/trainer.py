"""Everything one rank needs to train: stages, optimizer, data, checkpoints; and one step of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config import Config
from r1mega.data.dataset import build_dataset
from r1mega.data.loader import StepLoader
from r1mega.data.tokenizer import Tokenizer
from r1mega.moe.balance import max_over_mean, router_names
from r1mega.parallel_state import ParallelState
from r1mega.train.checkpoint import Checkpointer, Progress
from r1mega.train.learner import Learner
from r1mega.train.metrics import LOAD_PREFIX
from r1mega.train.run_folder import CHECKPOINT_FOLDER

LOAD_STEPS = 20


class Trainer:
    """One rank's part of a training run. Building it is a collective call.

    Args:
        config: the job.
        state: the layout's groups.
        checkpoint: where to go on from; None begins at the beginning.
    """

    def __init__(self, config: Config, state: ParallelState, checkpoint: Path | None = None) -> None:
        self.config, self.state = config, state
        self.learner = Learner(config, state)
        self.progress = self.learner.begin(checkpoint)
        self.checkpointer = Checkpointer(Path(config.train.output_dir) / CHECKPOINT_FOLDER, config)
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
        losses, numbers = self.learner.update(number, batches)
        loads = self.learner.update_router_bias()
        self.recent_loads.append(loads)
        tokens = config.train.global_batch_size * config.data.sequence_length
        self.progress = Progress(number, self.progress.tokens + tokens)
        metrics: dict[str, int | float] = {"step": number, "tokens": self.progress.tokens}
        metrics |= self._reduce(losses, loads)
        metrics |= numbers
        seconds = time.perf_counter() - started
        return metrics | {"step_seconds": seconds, "tokens_per_second": tokens / seconds}

    def validate(self) -> float | None:
        """Mean loss over the validation batches, the same on every rank; None without validation data."""
        if self.valid_loader is None:
            return None
        total = 0.0
        for index in range(self.config.train.valid_batches):
            batches = [batch.to(self.state.device) for batch in self.valid_loader.step(index)]
            total += self._sum_over_ranks([self.learner.executor.run(batches, forward_only=True).get("loss", 0.0)])[0]
        self.learner.reshard()
        return total / self.config.train.valid_batches

    def save(self) -> None:
        """Begin to write a checkpoint. Raises :class:`CheckpointError` where the one before it failed."""
        self.checkpointer.save(self.progress, self.learner.tensors())

    def close(self) -> None:
        """Wait for the last checkpoint and end the threads."""
        self.loader.close()
        self.checkpointer.finish()

    def _loader(self, blend: list[str], num_steps: int, prefetch: bool) -> StepLoader:
        data, train, state = self.config.data, self.config.train, self.state
        num_samples = num_steps * train.global_batch_size
        dataset = build_dataset(blend, data.sequence_length, num_samples, train.seed, data.cache_dir, self.tokenizer)
        return StepLoader(
            dataset, state.rank_in("dp"), state.size("dp"), train.global_batch_size, train.microbatch_size, prefetch
        )

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
        # Numbers become tensors by a fill: to copy them to a GPU, the host would wait for each.
        total = torch.stack([
            value.to(self.state.device, torch.float64)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float64, device=self.state.device)
            for value in values
        ])  # fmt: skip
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
