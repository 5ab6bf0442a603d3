"""r1mega training the step benchmark's workload; the program of one rank.

    torchrun --nproc-per-node 2 -m benchmarks.r1mega_step --ep 2

prints one line of JSON (see :class:`benchmarks.workload.Measurement`). A step is what r1mega's training loop does
between two batches: the pipeline schedule with the reduction of gradients in it, the global norm, the optimizer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import r1mega
from benchmarks.workload import (
    Workload,
    argument_parser,
    initial_weight,
    measure,
    microbatches_of,
    profile_step,
    report,
    sequence,
    start_process_group,
    workload_from,
)
from r1mega.config import AttentionConfig, ModelConfig, MoEConfig, OptimizerConfig, ParallelConfig, RopeConfig
from r1mega.data.batch import Batch
from r1mega.kernels.linear import local
from r1mega.model.blocks import place_blocks
from r1mega.model.init import local_slices
from r1mega.model.stage import build_stage
from r1mega.moe.router import Router
from r1mega.optim.adamw import AdamW
from r1mega.optim.gradients import Gradients
from r1mega.parallel_state import Layout, ParallelState
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.pipeline.schedules import SCHEDULES
from r1mega.train.sharding import named_shards, reduce_gradients, shard


def model_config(workload: Workload) -> ModelConfig:
    """The workload's model in r1mega's settings: Qwen3-MoE's shape without the norm of queries and keys."""
    return ModelConfig(
        vocab_size=workload.vocab_size,
        hidden_size=workload.hidden_size,
        num_layers=workload.num_layers,
        norm_eps=workload.norm_eps,
        attention=AttentionConfig(kind="gqa", num_heads=workload.num_heads, rope=RopeConfig(theta=workload.rope_theta)),
        moe=MoEConfig(
            num_experts=workload.num_experts,
            top_k=workload.top_k,
            ffn_hidden_size=workload.expert_width,
            score_function="softmax",
            score_bias=False,
        ),
    )


@torch.no_grad()
def fill_initial_weights(stage: nn.Module) -> None:
    """Give this rank's shards of a stage the workload's initial weights."""
    for name, parameter in stage.named_parameters():
        whole = initial_weight(name, tuple(parameter.shape))
        local(parameter).copy_(whole[local_slices(parameter)])
    for module in stage.modules():
        if isinstance(module, Router):
            module.tokens_per_expert.zero_()


class R1megaTrainer:
    """The workload in r1mega on this rank: stage, schedule, optimizer. The process group must exist."""

    def __init__(self, workload: Workload, tp: int = 1, pp: int = 1, ep: int = 1) -> None:
        # experts are cut over tp as well, as megatron-core does unless it is told otherwise
        parallel = ParallelConfig(tp=tp, pp=pp, ep=ep, etp=tp)
        layout = Layout.from_config(parallel, dist.get_world_size())
        state = ParallelState(layout)
        config = model_config(workload)
        stage_number = state.rank_in("pp")
        blocks = place_blocks(config, parallel, workload.sequence_length, pp)[stage_number]
        stage = build_stage(config, state, blocks, torch.float32, "meta")
        shard(stage, state, torch.float32)
        stage.to_empty(device="cpu")
        fill_initial_weights(stage)

        mine = microbatches_of(workload, state.rank_in("dp"), layout.dp)
        self.batches = [_batch(workload, index) for index in mine]
        self.executor = PipelineExecutor(
            SCHEDULES["1f1b"](pp, len(self.batches)),
            {stage_number: stage},
            state.group("pp") if pp > 1 else None,
            lambda _: reduce_gradients(stage),
        )
        parameters = named_shards([stage])
        self.gradients = Gradients(parameters, state)
        self.optimizer = AdamW(parameters, OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0))
        self.learning_rate = workload.learning_rate

    def step(self) -> tuple[float, float]:
        """Train one step; this rank's share of the loss and the global gradient norm."""
        metrics = self.executor.run(self.batches)
        self.gradients.finish()
        norm = self.gradients.norm()
        self.optimizer.step(self.learning_rate)
        return metrics["loss"].item() if "loss" in metrics else 0.0, norm


def _batch(workload: Workload, index: int) -> Batch:
    tokens, labels = (row[None] for row in sequence(workload, index))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Batch(tokens, labels, mask, workload.tokens_per_step, workload.num_microbatches)


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    start_process_group()
    workload = workload_from(arguments)
    trainer = R1megaTrainer(workload, arguments.tp, arguments.pp, arguments.ep)
    report(measure(f"r1mega {r1mega.__version__}", workload, trainer.step, arguments.num_steps))
    if arguments.profile:
        profile_step(trainer.step, arguments.profile)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
