"""One rank's part of a GRPO run: rollouts, log-probabilities, optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from r1mega.config import Config
from r1mega.data.batch import Batch
from r1mega.data.tokenizer import Tokenizer
from r1mega.moe.balance import max_over_mean, router_names
from r1mega.parallel_state import ParallelState
from r1mega.pipeline.actions import Kind
from r1mega.rl.experience import Experience, Group
from r1mega.rl.loss_metrics import merge_metrics
from r1mega.rl.measures import Measures, of_groups
from r1mega.rl.microbatches import Form, Head, LogProbHead, Microbatch, ObjectiveHead
from r1mega.rl.reference import Reference
from r1mega.rl.rollout.build import build_engine
from r1mega.rl.samples import Sample, exchange, random_order
from r1mega.train.checkpoint import Checkpointer, Progress
from r1mega.train.learner import Learner
from r1mega.train.run_folder import CHECKPOINT_FOLDER


class GrpoTrainer:
    """Building it is a collective call.

    Args:
        config: the job, as :func:`r1mega.rl.grpo.check_settings` leaves it.
        state: the layout's groups.
        checkpoint: where to go on from; None begins at the beginning.
    """

    def __init__(self, config: Config, state: ParallelState, checkpoint: Path | None = None) -> None:
        self.config, self.state = config, state
        self.learner = Learner(config, state)
        self.reference = Reference(self.learner) if config.rl.loss.kl_coefficient else None
        kept = {} if self.reference is None else self.reference.tensors()
        self.progress = self.learner.begin(checkpoint, kept)
        if self.reference is not None:
            self.reference.begin(is_loaded=checkpoint is not None)
        self.checkpointer = Checkpointer(Path(config.train.output_dir) / CHECKPOINT_FOLDER, config)
        self.tokenizer = Tokenizer.load(str(config.data.tokenizer))
        self.experience = Experience(
            config, state, build_engine(config, state, self.learner, self.tokenizer), self.tokenizer
        )
        dtype = torch.float64 if config.train.dtype == "float64" else torch.float32
        self._form = Form(config.rl.pack, state.size("tp"), dtype, state.device)
        self._router_names = router_names(config.model)
        self._moe_layers = self._layers_of_microbatches()

    def step(self) -> tuple[dict[str, int | float], list[Group]]:
        """One rollout and its optimizer steps.

        Returns:
            The metrics, the same on every rank; this data-parallel rank's groups.
        """
        started = time.perf_counter()
        rl, before = self.config.rl, self.progress
        rollout = before.step // rl.minibatches
        self.experience.engine.sync_weights()
        groups = self.experience.make(rollout)
        generated = time.perf_counter() - started
        measures = Measures(self.state)
        of_groups(measures, groups, self.experience)
        minibatches = self._minibatches(rollout, groups)
        self._add_log_probs(minibatches)
        for number, samples in enumerate(minibatches, start=before.step + 1):
            self._update(number, samples, measures)
        found = measures.means()
        tokens = found.pop("tokens")
        self.progress = Progress(before.step + rl.minibatches, before.tokens + round(tokens))
        seconds = time.perf_counter() - started
        metrics: dict[str, int | float] = {"step": self.progress.step, "tokens": self.progress.tokens} | found
        metrics |= {"rollout_seconds": generated, "step_seconds": seconds, "tokens_per_second": tokens / seconds}
        if self._failed_checkpoint():
            self.checkpointer.finish()
        return metrics, groups

    def save(self) -> None:
        """Begin to write a checkpoint. Raises :class:`CheckpointError` where the one before it failed."""
        kept = {} if self.reference is None else self.reference.tensors()
        self.checkpointer.save(self.progress, self.learner.tensors() | kept)

    def close(self) -> None:
        """Wait for the last checkpoint and end the reward workers."""
        self.experience.close()
        self.checkpointer.finish()

    def _minibatches(self, rollout: int, groups: Sequence[Group]) -> list[list[Sample]]:
        """This rank's samples of each minibatch, sorted by length so that microbatches need little padding.

        Which minibatch a sample is in depends on the seed alone. It may be another rank's: samples change ranks.
        """
        rl, batch, dp = self.config.rl, self.config.train.global_batch_size, self.state.size("dp")
        order = random_order(rl.minibatches * batch, self.config.train.seed, rollout)
        place = {index: position for position, index in enumerate(order)}
        mine = self.experience.samples(groups)
        owners = [place[sample.index] % batch * dp // batch for sample in mine]
        found: list[list[Sample]] = [[] for _ in range(rl.minibatches)]
        for sample in exchange(mine, owners, self.state.group("dp")):
            found[place[sample.index] // batch].append(sample)
        return [sorted(part, key=lambda sample: (sample.num_inputs, sample.index)) for part in found]

    def _microbatches(self, samples: Sequence[Sample]) -> list[Microbatch]:
        size = self.config.train.microbatch_size
        return [Microbatch(samples[i : i + size], self._form) for i in range(0, len(samples), size)]

    def _add_log_probs(self, minibatches: Sequence[Sequence[Sample]]) -> None:
        """Those of the old policy, where the rollout has several updates, and of the reference.

        With one update the old policy is the present one: its log-probabilities are those of the training forward.
        """
        rl = self.config.rl
        for samples in minibatches:
            if rl.old_log_probs == "rollout":
                for sample in samples:
                    sample.old_log_probs = sample.rollout_log_probs
            elif rl.minibatches > 1:
                self._compute(samples, "old_log_probs", replay=True)
        if self.reference is not None:
            with self.reference.in_place_of_the_policy():
                for samples in minibatches:
                    self._compute(samples, "ref_log_probs", replay=False)

    def _compute(self, samples: Sequence[Sample], name: str, replay: bool) -> None:
        """The log-probabilities of the tokens of ``samples`` under the stages' weights, as their attribute ``name``."""
        microbatches = self._microbatches(samples)
        heads = [LogProbHead(microbatch, self.config.rl.temperature) for microbatch in microbatches]
        batches = self._batches(microbatches, heads, replay)
        self.learner.executor.run(batches, forward_only=True)
        self.learner.reshard()
        self._require_replayed(batches)
        for microbatch, head in zip(microbatches, heads, strict=True):
            log_probs = microbatch.zeros() if head.log_probs is None else head.log_probs
            if self.state.size("pp") > 1:  # only the rank with the last stage has them
                dist.all_reduce(log_probs, group=self.state.group("pp"))
            for sample, part in zip(microbatch.samples, microbatch.split(log_probs), strict=True):
                setattr(sample, name, part)

    def _update(self, number: int, samples: Sequence[Sample], measures: Measures) -> None:
        """Optimizer step ``number``."""
        rl, state = self.config.rl, self.state
        microbatches = self._microbatches(samples)
        normalizer = self.config.train.global_batch_size
        if rl.loss.aggregation == "token":
            count = torch.tensor(sum(len(sample.tokens) for sample in samples if sample.in_loss), device=state.device)
            dist.all_reduce(count, group=state.group("dp"))
            normalizer = max(1, int(count.item()))
        heads = [ObjectiveHead(microbatch, rl.loss, rl.temperature, normalizer) for microbatch in microbatches]
        batches = self._batches(microbatches, heads, replay=True)
        metrics, numbers = self.learner.update(number, batches)
        self._require_replayed(batches)
        for name, value in numbers.items():
            measures.same(name, value)
        found = [head.metrics for head in heads if head.metrics]
        if found:
            measures.loss(merge_metrics(found))
        for name in self._router_names:
            if name in metrics:
                same, total = metrics[name].tolist()
                measures.add(f"routing_agreement/{name}", same, total)
        loads = self.learner.update_router_bias()
        if state.rank_in("tp_dp_cp") == 0:
            for name, load in loads.items():
                measures.add(f"expert_load/{name}", float(max_over_mean(load)))
        if state.rank_in("tp_pp") == 0:
            measures.total("tokens", sum(sample.num_inputs for sample in samples))
        if self.reference is not None and rl.reference_interval and number % rl.reference_interval == 0:
            self.reference.refresh()

    def _batches(self, microbatches: Sequence[Microbatch], heads: Sequence[Head], replay: bool) -> list[Batch]:
        found = []
        for number, (microbatch, head) in enumerate(zip(microbatches, heads, strict=True)):
            layers = self._moe_layers[number] if replay and self.config.rl.routing_replay else []
            found.append(microbatch.batch(head, layers))
        return found

    def _require_replayed(self, batches: Sequence[Batch]) -> None:
        for number, batch in enumerate(batches):
            if batch.experts is not None:
                batch.experts.require_used(self._moe_layers[number])

    def _layers_of_microbatches(self) -> list[list[int]]:
        """The MoE layers of this rank that each microbatch of a step goes through (not all in a bidirectional pipe)."""
        table, config = self.learner.table, self.config.model
        found: list[list[int]] = [[] for _ in range(table.num_microbatches)]
        for action in table.actions(self.state.rank_in("pp")):
            if action.kind is Kind.F:
                layers = map(int, dict(self.learner.stages[action.stage].get_submodule("layers").named_children()))
                found[action.microbatch] += [layer for layer in layers if config.is_moe_layer(layer)]
        return found

    def _failed_checkpoint(self) -> bool:
        failed = torch.tensor([int(self.checkpointer.failed())], device=self.state.device)
        dist.all_reduce(failed)
        return bool(failed.item())
