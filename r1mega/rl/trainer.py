"""One rank's part of a GRPO run: rollouts, log-probabilities, optimizer steps."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config import Config
from r1mega.data.batch import Batch
from r1mega.data.tokenizer import Tokenizer
from r1mega.model.blocks import place_blocks
from r1mega.moe.balance import max_over_mean, router_names
from r1mega.moe.replay import ReplayError
from r1mega.parallel_state import ParallelState
from r1mega.rl.critic import PPOHead, ValueHead, add_advantages
from r1mega.rl.experience import Experience, Group
from r1mega.rl.loss_metrics import merge_metrics
from r1mega.rl.measures import Measures, of_groups
from r1mega.rl.microbatches import Form, Head, LogProbHead, Microbatch, ObjectiveHead
from r1mega.rl.reference import Reference
from r1mega.rl.rollout.build import build_engine
from r1mega.rl.samples import Sample, exchange, random_order, share_experts
from r1mega.tensor_parallel.layers import Linear
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
        rl = config.rl
        has_reference = rl.loss.kl_coefficient or (rl.algorithm == "ppo" and rl.ppo.reward_kl_coefficient)
        self.reference = Reference(self.learner) if has_reference else None
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
        # how attention rounds in bfloat16 depends on the length, but not among multiples of 16
        multiple = math.lcm(16 if config.train.dtype == "bfloat16" else 1, state.size("tp"))
        self._form = Form(config.rl.pack, multiple, dtype, state.device)
        heads = [getattr(stage, "value_head", None) for stage in self.learner.stages.values()]
        self._value_head: Linear | None = next((head for head in heads if head is not None), None)
        self._router_names = router_names(config.model)
        self._layers_by_rank = self._layers_of_microbatches()
        self._moe_layers = self._layers_by_rank[state.rank_in("pp")]

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

    def finish(self) -> None:
        """Wait for the last checkpoint. Raises :class:`CheckpointError` where it failed."""
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
        found = [sorted(part, key=lambda sample: (sample.num_inputs, sample.index)) for part in found]
        if rl.routing_replay:
            self._require_recorded(mine)
            if self.learner.table.num_copies > 1:
                self._share_experts(found)
        return found

    def _require_recorded(self, samples: Sequence[Sample]) -> None:
        """The rollout has recorded the layers of this rank, no fewer and no more."""
        expected = sorted(self._moe_layers[0])  # it runs on the first copy of the model, as microbatch 0 does
        for sample in samples:
            if sorted(sample.experts) != expected:
                raise ReplayError(
                    f"completion {sample.index}: the rollout recorded expert choices of layers "
                    f"{sorted(sample.experts)}, not of {expected}"
                )

    def _share_experts(self, minibatches: Sequence[Sequence[Sample]]) -> None:
        """The rollout runs on the first copy of the model: the ranks of the others get its choices of experts."""
        size = self.config.train.microbatch_size
        recorded = {layer: rank for rank, rows in enumerate(self._layers_by_rank) for layer in rows[0]}
        for samples in minibatches:
            wanted = [[rows[number // size] for number in range(len(samples))] for rows in self._layers_by_rank]
            share_experts(samples, wanted, recorded, self.config.model.moe.top_k, self.state.group("pp"))

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
            elif rl.minibatches > 1 or rl.algorithm == "ppo":
                self._compute(samples, "old_log_probs", replay=True)
        if self.reference is not None:
            with self.reference.in_place_of_the_policy():
                for samples in minibatches:
                    self._compute(samples, "ref_log_probs", replay=False)
        if rl.algorithm == "ppo":
            samples = [sample for part in minibatches for sample in part]
            rewards = [float(sample.advantage) for sample in samples]
            add_advantages(samples, rewards, rl.ppo, self.state.group("dp"))

    def _compute(self, samples: Sequence[Sample], name: str, replay: bool) -> None:
        """The log-probabilities of the tokens of ``samples`` under the stages' weights, as their attribute ``name``."""
        microbatches = self._microbatches(samples)
        wants_values = self.config.rl.algorithm == "ppo" and name == "old_log_probs"
        heads = [self._log_prob_head(microbatch, wants_values) for microbatch in microbatches]
        batches = self._batches(microbatches, heads, replay)
        self.learner.executor.run(batches, forward_only=True)
        self.learner.reshard()
        self._require_replayed(batches)
        for microbatch, head in zip(microbatches, heads, strict=True):
            self._keep(microbatch, name, head.log_probs)
            if wants_values:
                self._keep(microbatch, "values", head.values if isinstance(head, ValueHead) else None)

    def _log_prob_head(self, microbatch: Microbatch, wants_values: bool) -> LogProbHead:
        if wants_values and self._value_head is not None:
            return ValueHead(microbatch, self.config.rl.temperature, self._value_head)
        return LogProbHead(microbatch, self.config.rl.temperature)

    def _keep(self, microbatch: Microbatch, name: str, found: Tensor | None) -> None:
        """Numbers of tokens, which the ranks with a last stage have found, as an attribute of the samples."""
        numbers = microbatch.zeros() if found is None else found.to(self._form.dtype)
        if self.state.size("pp") > 1:
            dist.all_reduce(numbers, group=self.state.group("pp"))
        for sample, part in zip(microbatch.samples, microbatch.split(numbers), strict=True):
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
        heads = [self._objective_head(microbatch, normalizer) for microbatch in microbatches]
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
                if load.any():  # layers of multi-token prediction have nothing to do in RL
                    measures.add(f"expert_load/{name}", float(max_over_mean(load)))
        if state.rank_in("tp_pp") == 0:
            measures.total("tokens", sum(sample.num_inputs for sample in samples))
        if self.reference is not None and rl.reference_interval and number % rl.reference_interval == 0:
            self.reference.refresh()

    def _objective_head(self, microbatch: Microbatch, normalizer: float) -> ObjectiveHead:
        rl = self.config.rl
        if rl.algorithm == "ppo" and self._value_head is not None:
            return PPOHead(microbatch, rl.loss, rl.temperature, normalizer, rl.ppo, self._value_head)
        return ObjectiveHead(microbatch, rl.loss, rl.temperature, normalizer)

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

    def _layers_of_microbatches(self) -> list[list[list[int]]]:
        """The MoE layers of each pipeline rank that each microbatch of a step goes through: with two copies of the
        model not all of them."""
        table, config = self.learner.table, self.config
        placed = place_blocks(config.model, config.parallel, config.data.sequence_length, table.stages_per_copy)
        moe = [[block.index for block in stage if block.kind == "t"] for stage in placed]
        moe = [list(filter(config.model.is_moe_layer, layers)) for layers in moe]
        found: list[list[list[int]]] = [[[] for _ in range(table.num_microbatches)] for _ in range(table.num_ranks)]
        for stage, rank in enumerate(table.stage_to_rank):
            for microbatch in table.microbatches_of(stage):
                found[rank][microbatch] += moe[stage % table.stages_per_copy]
        return found

    def _failed_checkpoint(self) -> bool:
        failed = torch.tensor([int(self.checkpointer.failed())], device=self.state.device)
        dist.all_reduce(failed)
        return bool(failed.item())
