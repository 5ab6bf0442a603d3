"""A GRPO update of a tiny R1-shaped model under any layout, from samples that are made up, so that layouts compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from r1mega.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RLConfig, TrainConfig
from r1mega.optim.gradients import Gradients
from r1mega.parallel_state import Layout, ParallelState
from r1mega.pipeline.actions import Kind
from r1mega.rl.critic import PPOHead
from r1mega.rl.loss_metrics import merge_metrics
from r1mega.rl.microbatches import Form, Microbatch, ObjectiveHead
from r1mega.rl.options import LossOptions, PPOOptions
from r1mega.rl.samples import Sample
from r1mega.train.learner import Learner
from tests.distributed.training import Report, _merge, _sum_over_ranks, tiny_model

NUM_SAMPLES = 8
MAX_TOKENS = 15


def model_of_rl(**changes) -> ModelConfig:
    """The tiny model without losses of its router."""
    model = tiny_model(**changes)
    return dataclasses.replace(
        model, moe=dataclasses.replace(model.moe, aux_loss_coefficient=0.0, z_loss_coefficient=0.0)
    )


@dataclass
class Job:
    """What to do; ``sabotage`` gets the object that completes the gradients and may break it."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=model_of_rl)
    options: LossOptions = field(default_factory=lambda: LossOptions(kl_coefficient=0.1))
    microbatch_size: int = 2
    pack: bool = False
    replay: bool = True
    temperature: float = 0.7
    dtype: str = "float64"
    num_steps: int = 2
    ppo: bool = False
    sabotage: Callable[[Gradients], None] | None = None


def samples(model: ModelConfig) -> list[Sample]:
    """All samples of a step; lengths differ, one is not in the loss, one has no advantage."""
    chance = torch.Generator().manual_seed(7)

    def integers(high: int, count: int) -> list[int]:
        return torch.randint(0, high, (count,), generator=chance).tolist()

    found = []
    for index in range(NUM_SAMPLES):
        num_prompt, num_tokens = 2 + index % 3, 3 + 5 * index % 8
        rows = num_prompt + num_tokens - 1
        experts = {}
        for layer in filter(model.is_moe_layer, range(model.num_layers)):
            scores = torch.rand(rows, model.moe.num_experts, generator=chance)
            experts[layer] = scores.topk(model.moe.top_k).indices.to(torch.int16)
        log_probs = [-3 + torch.randn(num_tokens, generator=chance, dtype=torch.float64) for _ in range(3)]
        advantage = 0.0 if index == 5 else float(torch.randn((), generator=chance))
        prompt, tokens = integers(model.vocab_size, num_prompt), integers(model.vocab_size, num_tokens)
        values = [torch.randn(num_tokens, generator=chance, dtype=torch.float64) for _ in range(2)]
        more = [*log_probs[1:], *values]
        found.append(Sample(index, prompt, tokens, advantage, log_probs[0], index != 3, experts, *more))
    return found


def update(rank: int, world_size: int, job: Job) -> Report:
    """Optimizer steps on the same samples; the report of rank 0 is the whole truth."""
    config = Config(
        model=dataclasses.replace(job.model, value_head=job.ppo),
        parallel=job.parallel,
        data=DataConfig(sequence_length=MAX_TOKENS + -MAX_TOKENS % job.parallel.tp),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, clip_grad=0.5),
        train=TrainConfig(
            num_steps=10, global_batch_size=NUM_SAMPLES, microbatch_size=job.microbatch_size, dtype=job.dtype
        ),
        rl=RLConfig(),
    )
    state = ParallelState(Layout.from_config(job.parallel, world_size))
    learner = Learner(config, state)
    learner.begin(None)
    if job.sabotage is not None:
        job.sabotage(learner.gradients)
    everyone, dp = samples(job.model), state.size("dp")
    mine = everyone[NUM_SAMPLES * state.rank_in("dp") // dp : NUM_SAMPLES * (state.rank_in("dp") + 1) // dp]
    form = Form(job.pack, state.size("tp"), torch.float64, state.device)
    microbatches = [
        Microbatch(mine[i : i + job.microbatch_size], form) for i in range(0, len(mine), job.microbatch_size)
    ]
    normalizer = NUM_SAMPLES
    if job.options.aggregation == "token":
        normalizer = sum(len(sample.tokens) for sample in everyone if sample.in_loss)
    layers = layers_of_microbatches(learner, state)
    report = Report()
    norm = learner.gradients.norm

    def keep_and_norm() -> float:  # the optimizer frees the gradients
        report.gradients.append(_merge([(name, parameter.grad) for name, parameter in learner.parameters], report))
        return norm()

    learner.gradients.norm = keep_and_norm
    for number in range(1, job.num_steps + 1):
        heads = [head_of(microbatch, job, normalizer, learner) for microbatch in microbatches]
        batches = [
            microbatch.batch(head, layers[i] if job.replay else [])
            for i, (microbatch, head) in enumerate(zip(microbatches, heads, strict=True))
        ]
        metrics, numbers = learner.update(number, batches)
        for i, batch in enumerate(batches):
            if job.replay:
                batch.experts.require_used(layers[i])
        sums = merge_metrics([head.metrics for head in heads if head.metrics])
        sums = {name: value for name, value in sums.items() if not name.endswith("_max")}
        report.losses.append(_sum_over_ranks(sums))
        agreements = sums_by_name(metrics)
        report.losses[-1] |= {name: same / total for name, (same, total) in agreements.items()}
        report.norms.append(numbers["grad_norm"])
        learner.update_router_bias()
    report.parameters = _merge(learner.parameters, report)
    return report if rank == 0 else Report()


def head_of(microbatch: Microbatch, job: Job, normalizer: float, learner: Learner) -> ObjectiveHead:
    given = microbatch, job.options, job.temperature, normalizer
    if not job.ppo:
        return ObjectiveHead(*given)
    value_heads = [stage.value_head for stage in learner.stages.values() if stage.value_head is not None]
    return PPOHead(*given, PPOOptions(), value_heads[0] if value_heads else None)


def sums_by_name(metrics: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """The routing agreement's two sums, over ranks."""
    mine = {f"{name}.{i}": value[i] for name, value in metrics.items() if value.dim() for i in (0, 1)}
    everyone = _sum_over_ranks(mine)
    return {name: [everyone[f"{name}.0"], everyone[f"{name}.1"]] for name in {key[:-2] for key in everyone}}


def layers_of_microbatches(learner: Learner, state: ParallelState) -> list[list[int]]:
    """MoE layers of this rank by microbatch."""
    found: list[list[int]] = [[] for _ in range(learner.table.num_microbatches)]
    for action in learner.table.actions(state.rank_in("pp")):
        if action.kind is Kind.F:
            found[action.microbatch] += [
                int(i) for i in learner.stages[action.stage].layers if learner.config.model.is_moe_layer(int(i))
            ]
    return found
