"""r1mega training the step benchmark's workload; the program of one rank.

    torchrun --nproc-per-node 2 -m benchmarks.r1mega_step --ep 2

prints one line of JSON (see :class:`benchmarks.workload.Measurement`). A step is what r1mega's training loop does
between two batches: the pipeline schedule with the reduction of gradients in it, the global norm, the optimizer, and
the count of the experts' load.
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
from r1mega.config import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeConfig,
    TrainConfig,
)
from r1mega.data.batch import Batch
from r1mega.kernels.parameter import local
from r1mega.model.init import local_slices
from r1mega.moe.balance import named_routers, update_router_bias
from r1mega.moe.router import Router
from r1mega.optim.adamw import AdamW
from r1mega.optim.gradients import Gradients
from r1mega.parallel_state import Layout, ParallelState
from r1mega.train.schedule import build_table
from r1mega.train.sharding import named_shards
from r1mega.train.stages import build_executor, build_stages


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
        if name.endswith("gate_up_proj"):
            experts, _, width, hidden = parameter.shape
            parts = (name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
            whole = torch.stack([initial_weight(part, (experts, width, hidden)) for part in parts], dim=1)
        else:
            whole = initial_weight(name, tuple(parameter.shape))
        local(parameter).copy_(whole[local_slices(parameter)])
    for module in stage.modules():
        if isinstance(module, Router):
            module.tokens_per_expert.zero_()


class R1megaTrainer:
    """The workload in r1mega on this rank: stages, schedule, optimizer. The process group must exist."""

    def __init__(self, workload: Workload, tp: int = 1, pp: int = 1, ep: int = 1) -> None:
        config = Config(
            model=model_config(workload),
            # experts are cut over tp as well, as megatron-core does unless it is told otherwise
            parallel=ParallelConfig(tp=tp, pp=pp, ep=ep, etp=tp),
            data=DataConfig(sequence_length=workload.sequence_length),
            optimizer=OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0),
        )
        self.learning_rate = workload.learning_rate
        self.state = ParallelState(Layout.from_config(config.parallel, dist.get_world_size()))
        num_sequences = workload.num_microbatches * self.state.size("dp")
        self.tokens_per_step = num_sequences * workload.sequence_length
        config.train = TrainConfig(global_batch_size=num_sequences)
        table = build_table(config.parallel, workload.num_microbatches, [])
        self.stages = build_stages(config, self.state, table)
        for stage in self.stages.values():
            fill_initial_weights(stage)
        self.executor = build_executor(table, self.stages, self.state)
        parameters = named_shards(self.stages.values())
        self.routers = named_routers(self.stages.values())
        self.gradients = Gradients(parameters, self.state)
        self.optimizer = AdamW(parameters, config.optimizer)
        mine = microbatches_of(workload, self.state.rank_in("dp"))
        self.batches = [_batch(workload, index, num_sequences) for index in mine]

    def step(self) -> tuple[float, float]:
        """Train one step; this rank's share of the loss and the global gradient norm."""
        metrics = self.executor.run(self.batches)
        self.gradients.finish()
        norm = self.gradients.norm()
        self.optimizer.step(self.learning_rate)
        update_router_bias(self.routers, self.state)
        return float(metrics.get("loss", 0.0)), norm


def _batch(workload: Workload, index: int, num_sequences: int) -> Batch:
    tokens, labels = (row[None] for row in sequence(workload, index))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Batch(tokens, labels, mask, num_sequences * workload.sequence_length, num_sequences)


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    start_process_group()
    workload = workload_from(arguments)
    trainer = R1megaTrainer(workload, arguments.tp, arguments.pp, arguments.ep)
    report(measure(f"r1mega {r1mega.__version__}", trainer.tokens_per_step, trainer.step, arguments.num_steps))
    if arguments.profile:
        profile_step(trainer.step, arguments.profile)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
