"""Generation of a tiny model under any layout, in a form that layouts can be compared by."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.config import AttentionConfig, ModelConfig, MoEConfig, ParallelConfig
from r1mega.data.batch import Batch
from r1mega.kernels.parameter import local
from r1mega.model.blocks import list_blocks, place_blocks
from r1mega.model.init import initialize
from r1mega.model.stage import build_stage
from r1mega.moe.replay import ExpertRecord
from r1mega.parallel_state import Layout, ParallelState
from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.executor import PipelineExecutor, StageOutput
from r1mega.pipeline.schedules import with_reductions
from r1mega.rl.rollout.engine import Completion, Request, Sampling
from r1mega.rl.rollout.native import NativeEngine
from r1mega.tensor_parallel.collectives import gather_tokens
from r1mega.train.schedule import build_table
from r1mega.train.sharding import named_shards, reshard, shard
from tests.distributed.training import tiny_model

VOCABULARY = 61  # ids; the model has 64 rows
PLAIN_QUERY = AttentionConfig(num_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
GROUPED = AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True)
MODELS: dict[str, ModelConfig] = {
    "mla": tiny_model(),
    "mla_without_q_lora": tiny_model(attention=PLAIN_QUERY, tie_embeddings=True),
    "gqa": tiny_model(
        attention=GROUPED,
        num_mtp_layers=0,
        moe=MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=16, score_function="softmax", score_bias=False),
    ),
    "dense": tiny_model(moe=MoEConfig(), num_mtp_layers=0),
}


def make_requests(num_prompts: int = 7, num_samples: int = 3) -> list[Request]:
    """Prompts of 2 to 9 tokens."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for key in range(num_prompts):
        length = 2 + (5 * key) % 8
        prompt = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        found.append(Request(prompt, 100 + key, num_samples))
    return found


@dataclass
class Job:
    """What to generate, and how."""

    model: str = "mla"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    dtype: torch.dtype = torch.float64
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=14, seed=7, stop=(3, 4, 9)))
    requests: list[Request] = field(default_factory=make_requests)
    max_rows: int = 8
    empty_ranks: int = 0  # so many data-parallel ranks get no request
    absorbs: bool = True
    multiple: int = 4  # what the lengths of the training's forward are multiples of


@dataclass
class Result:
    """Of one rank: completions in the order of ``generate`` and of ``on_finished``, and the same by the training's
    forward: log-probabilities and experts of each completion."""

    replica: int
    completions: list[Completion]
    finished_order: list[tuple[int, int]]
    log_probs: list[Tensor]
    experts: list[dict[int, Tensor]]
    counted: int  # by the routers' counters


def build(job: Job, state: ParallelState) -> tuple[dict[int, nn.Module], Table]:
    """This rank's stages, initialised, and the table that places them."""
    model = MODELS[job.model]
    blocks = list_blocks(model, 16)
    table = build_table(job.parallel, 4, blocks)
    placed = place_blocks(model, job.parallel, 16, table.stages_per_copy)
    stored = torch.float32 if job.dtype == torch.bfloat16 else job.dtype
    stages: dict[int, nn.Module] = {}
    for number in table.stages_of(state.rank_in("pp")):
        stage = stages[number] = build_stage(model, state, placed[number % table.stages_per_copy], stored)
        shard(stage, state, job.dtype)
        stage.to_empty(device="cpu")
        initialize(stage, model, seed=0)
    named_shards(stages.values())
    return stages, table


def generate(rank: int, world_size: int, job: Job) -> Result:
    """Generate on this rank, and compute the same with the training's forward."""
    state = ParallelState(Layout.from_config(job.parallel, world_size))
    stages, table = build(job, state)
    model = MODELS[job.model]
    engine = NativeEngine(stages, table, state, model, job.dtype, VOCABULARY, job.max_rows, absorbs=job.absorbs)
    replica, num_replicas = state.rank_in("dp"), state.size("dp") - job.empty_ranks
    mine = job.requests[replica::num_replicas] if replica < num_replicas else []
    order: list[tuple[int, int]] = []
    completions = engine.generate(mine, job.sampling, lambda c: order.append((c.key, c.sample)))
    log_probs, experts = forward(job, completions, stages, table, state)
    routers = [buffer for stage in stages.values() for name, buffer in stage.named_buffers() if "tokens_per" in name]
    return Result(replica, completions, order, log_probs, experts, sum(int(buffer.sum()) for buffer in routers))


def forward(
    job: Job, completions: list[Completion], stages: dict[int, nn.Module], table: Table, state: ParallelState
) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
    """Log-probabilities and experts of the completions, by the training's forward of whole sequences."""
    fed = [(completion.prompt + completion.tokens)[:-1] for completion in completions] or [[0]]
    longest = max(map(len, fed))
    longest += -longest % job.multiple
    record, found = ExpertRecord(), []
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in fed])
    batch = Batch(tokens, None, None, 1, 1, experts=record, head=functools.partial(_keep, found))
    once = one_microbatch(table)
    mine = {number: stages[number] for number in once.stages_of(state.rank_in("pp"))}
    PipelineExecutor(once, mine, state.group("pp") if state.size("pp") > 1 else None).run([batch], forward_only=True)
    for stage in stages.values():
        reshard(stage)
    log_probs = []
    for logits, completion in zip(found[0].unflatten(0, (-1, longest)) if found else (), completions, strict=False):
        of_tokens = logits[len(completion.prompt) - 1 :][: len(completion.tokens)]
        of_tokens = of_tokens.to(torch.promote_types(logits.dtype, torch.float32)) / (job.sampling.temperature or 1)
        chosen = torch.tensor(completion.tokens).unsqueeze(1)
        log_probs.append(of_tokens.log_softmax(-1).gather(1, chosen).squeeze(1))
    choices = {layer: whole(part, state, dim=0).unflatten(0, (-1, longest)) for layer, part in record.choices.items()}
    return log_probs, [
        {layer: part[row, : len(ids)] for layer, part in choices.items()}
        for row, ids in enumerate(fed[: len(completions)])
    ]


def one_microbatch(table: Table) -> Table:
    """One microbatch through the stages of ``table``'s first copy of the model."""
    stage_to_rank = table.stage_to_rank[: table.stages_per_copy]
    rows: list[list[Action]] = [[] for _ in range(table.num_ranks)]
    for kind in (Kind.F, Kind.B):
        for stage, rank in sorted(enumerate(stage_to_rank), reverse=kind is Kind.B):
            rows[rank].append(Action(kind, stage, 0))
    return Table(stage_to_rank, with_reductions(rows))


def _keep(found: list[Tensor], hidden: Tensor, lm_head: nn.Module, group: dist.ProcessGroup) -> StageOutput:
    """A head that keeps the logits, as wide as the loss has them."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = gather_tokens(hidden, group).to(wide) @ local(lm_head.weight).to(wide).t()
    found.append(all_gather(logits, group, dim=1))
    return StageOutput()


def whole(part: Tensor, state: ParallelState, dim: int) -> Tensor:
    """The parts of the tensor-parallel ranks side by side."""
    return all_gather(part.to(torch.int32), state.group("tp"), dim).to(part.dtype)


def all_gather(part: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
