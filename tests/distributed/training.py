"""A few training steps of a tiny R1-shaped model under any layout, in a form that layouts can be compared by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from r1mega.config import AttentionConfig, ModelConfig, MoEConfig, OptimizerConfig, ParallelConfig
from r1mega.data.batch import Batch
from r1mega.kernels.parameter import local
from r1mega.model.blocks import list_blocks, place_blocks
from r1mega.model.init import initialize, local_slices
from r1mega.model.stage import build_stage
from r1mega.moe.balance import named_routers, update_router_bias
from r1mega.optim.adamw import AdamW
from r1mega.optim.copies import Copies
from r1mega.optim.gradients import Gradients
from r1mega.parallel_state import Layout, ParallelState
from r1mega.train.schedule import build_table
from r1mega.train.sharding import named_shards, shard
from r1mega.train.stages import build_executor

LENGTH = 16
GLOBAL_BATCH = 8


def tiny_model(**changes) -> ModelConfig:
    """One dense layer, then MoE with groups and a shared expert; MLA with q-LoRA, one MTP layer, auxiliary losses."""
    settings = dict(
        vocab_size=64,
        hidden_size=32,
        num_layers=4,
        first_dense_layers=1,
        ffn_hidden_size=64,
        num_mtp_layers=1,
        init_std=0.2,
        attention=AttentionConfig(
            num_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        moe=MoEConfig(
            num_experts=8,
            top_k=3,
            ffn_hidden_size=16,
            num_shared_experts=1,
            num_groups=4,
            top_k_groups=2,
            aux_loss_coefficient=0.05,
            z_loss_coefficient=0.01,
            bias_update_rate=0.01,
        ),
    )
    return ModelConfig(**(settings | changes))


@dataclass
class Job:
    """What to train. ``sabotage`` gets the object that completes the gradients and may break it.

    ``changing_shapes``: every sequence has a length of its own, another one in each step; for microbatches of one.
    """

    model: ModelConfig = field(default_factory=tiny_model)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    num_steps: int = 3
    microbatch_size: int = 2
    dtype: torch.dtype = torch.float64
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-2, clip_grad=0.5, weight_decay=0.1)
    )
    sabotage: Callable[[Gradients], None] | None = None
    keep_gradients: bool = True
    changing_shapes: bool = False


@dataclass
class Report:
    """Losses and gradient norm of each step; gathered gradients of each step and final parameters, on rank 0."""

    losses: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    disagreements: list[str] = field(default_factory=list)


def global_batch(step: int, vocab_size: int) -> torch.Tensor:
    """``[GLOBAL_BATCH, LENGTH + 1]`` tokens."""
    return torch.randint(0, vocab_size, (GLOBAL_BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def microbatches(job: Job, state: ParallelState, step: int) -> list[Batch]:
    """This rank's microbatches; some labels are masked, so that token counts differ from rank to rank."""
    tokens = global_batch(step, job.model.vocab_size)
    mask = torch.ones(GLOBAL_BATCH, LENGTH, dtype=torch.bool)
    mask[1, 5:] = False
    mask[6, :3] = False
    lengths = [LENGTH] * GLOBAL_BATCH
    if job.changing_shapes:
        assert job.microbatch_size == 1, "a microbatch of several sequences has one length"
        lengths = [LENGTH - (5 * sequence + 3 * step) % 11 for sequence in range(GLOBAL_BATCH)]
    count = sum(int(each[:length].sum()) for each, length in zip(mask, lengths, strict=True))
    per_rank = GLOBAL_BATCH // state.size("dp")
    first = state.rank_in("dp") * per_rank
    found = []
    for start in range(first, first + per_rank, job.microbatch_size):
        rows, length = slice(start, start + job.microbatch_size), lengths[start]
        tokens_, labels = tokens[rows, :length], tokens[rows, 1 : length + 1]
        found.append(Batch(tokens_, labels, mask[rows, :length], count, GLOBAL_BATCH))
    return found


def train(rank: int, world_size: int, job: Job) -> Report:
    """Train on this rank; the report of rank 0 is the whole truth."""
    parallel = job.parallel
    state = ParallelState(Layout.from_config(parallel, world_size))
    num_microbatches = GLOBAL_BATCH // state.size("dp") // job.microbatch_size
    table = build_table(parallel, num_microbatches, list_blocks(job.model, LENGTH))
    placed = place_blocks(job.model, parallel, LENGTH, table.stages_per_copy)
    stored = torch.float32 if job.dtype == torch.bfloat16 else job.dtype  # master weights
    stages = {}
    for number in table.stages_of(state.rank_in("pp")):
        stage = stages[number] = build_stage(job.model, state, placed[number % table.stages_per_copy], stored)
        shard(stage, state, job.dtype)
        stage.to_empty(device="cpu")
        initialize(stage, job.model, seed=0)
    parameters, routers = named_shards(stages.values()), named_routers(stages.values())
    copies = Copies([name for name, _ in [*parameters, *routers]], state)
    optimizer, gradients = AdamW(parameters, job.optimizer), Gradients(parameters, state, copies)
    if job.sabotage is not None:
        job.sabotage(gradients)
    executor = build_executor(table, stages, state)
    report = Report()
    for step in range(job.num_steps):
        metrics = executor.run(microbatches(job, state, step))
        gradients.finish()
        norm = gradients.norm()
        if job.keep_gradients:
            report.gradients.append(_merge([(name, parameter.grad) for name, parameter in parameters], report))
        gradients.clip(norm, job.optimizer.clip_grad)
        optimizer.step(job.optimizer.learning_rate)
        update_router_bias(routers, state, copies)
        report.losses.append(_sum_over_ranks(metrics))
        report.norms.append(norm)
    report.parameters = _merge(parameters, report)
    buffers = [named for stage in stages.values() for named in stage.named_buffers()]
    biases = [(name, buffer) for name, buffer in buffers if name.endswith("bias")]
    report.biases = _merge(biases, report)
    return report if rank == 0 else Report()


def _merge(mine: list[tuple[str, torch.Tensor]], report: Report) -> dict[str, torch.Tensor]:
    """Put the ranks' shards together on rank 0; notes in the report where two ranks disagree on an element."""
    shards = [
        (name, tuple(tensor.shape), local_slices(tensor), local(tensor).detach().clone()) for name, tensor in mine
    ]
    everyone: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(shards, everyone if dist.get_rank() == 0 else None)
    merged: dict[str, torch.Tensor] = {}
    for part in everyone:
        for name, shape, slices, shard_ in part:
            whole = merged.setdefault(name, torch.full(shape, torch.nan, dtype=shard_.dtype))
            known = ~whole[slices].isnan()
            if not torch.allclose(whole[slices][known], shard_[known], rtol=1e-9, atol=1e-12):
                report.disagreements.append(name)
            whole[slices] = shard_
    for name, whole in merged.items():
        assert not whole.isnan().any(), f"nobody holds a part of {name}"
    return merged


def _sum_over_ranks(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    everyone: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, {name: value.item() for name, value in metrics.items()})
    names = sorted({name for part in everyone for name in part})
    return {name: sum(part.get(name, 0.0) for part in everyone) for name in names}
