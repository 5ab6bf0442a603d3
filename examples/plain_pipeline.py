"""Any pipeline schedule for a model of your own: plain PyTorch modules, nothing of r1mega's model.

    torchrun --nproc-per-node 4 examples/plain_pipeline.py                      # zbv on 4 ranks
    torchrun --nproc-per-node 2 examples/plain_pipeline.py --schedule dualpipe
    torchrun --nproc-per-node 4 examples/plain_pipeline.py --table mine.csv     # a table of your own

A small language model reads this file byte by byte. Each rank makes the stages that the table gives to it, wraps them
in PlainStage and lets PipelineExecutor run the table; the optimizer is torch's own. Before training, the gradients are
compared with those of the whole model in one process. Set OMP_NUM_THREADS=1, as all ranks share the processor.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed where r1mega is installed

from r1mega.cli import report
from r1mega.config import ConfigError
from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.pipeline.plain import PlainStage
from r1mega.pipeline.schedules import SCHEDULES, make_table
from r1mega.pipeline.table_file import read_table

WIDTH, HEADS, LENGTH, ROWS = 64, 4, 64, 4
Microbatch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def build(stage: int, num_stages: int) -> nn.Module:
    """Stage ``stage`` of the model: one layer, with the embedding in front or the head behind."""
    torch.manual_seed(stage)  # the same weights on whichever rank the stage is
    first = [nn.Embedding(256, WIDTH)] if stage == 0 else []
    last = [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)] if stage == num_stages - 1 else []
    return nn.Sequential(*first, Block(), *last)


def microbatches(step: int, count: int) -> list[Microbatch]:
    """The microbatches of one step: windows of this file, and the same one byte later."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(text) - LENGTH - 1, (count, ROWS, 1), generator=generator)
    windows = text[starts + torch.arange(LENGTH + 1)]
    return [(window[:, :-1], window[:, 1:]) for window in windows]


def largest_difference(table: Table, stages: dict[int, nn.Module], loss, data: list[Microbatch]) -> float:
    """Between the gradients of this rank's stages and those of the whole model run at once, relative to the largest."""
    whole = [build(stage, table.stages_per_copy) for stage in range(table.stages_per_copy)]
    for microbatch in data:
        loss(nn.Sequential(*whole)(microbatch[0]), microbatch).backward()
    pairs = [
        (mine.grad, theirs.grad)
        for number, stage in stages.items()
        for mine, theirs in zip(stage.parameters(), whole[number % table.stages_per_copy].parameters(), strict=True)
    ]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def find_table(arguments: argparse.Namespace) -> Table:
    """The table to run, checked before anything is started. Raises ConfigError."""
    if "WORLD_SIZE" not in os.environ:
        raise ConfigError("torchrun must start this: torchrun --nproc-per-node 4 examples/plain_pipeline.py")
    world_size = int(os.environ["WORLD_SIZE"])
    where = f"table={arguments.table}" if arguments.table else f"schedule={arguments.schedule}"
    try:
        if arguments.table:
            table = read_table(arguments.table)
        else:
            table = make_table(arguments.schedule, world_size, arguments.microbatches)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if table.num_ranks != world_size:
        raise ConfigError(f"{where}: is for {table.num_ranks} ranks, torchrun started {world_size}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", default="zbv", choices=list(SCHEDULES), help="default %(default)s")
    parser.add_argument("--table", metavar="FILE", help="a schedule as CSV, instead of --schedule")
    parser.add_argument("--microbatches", type=int, default=8, help="of a step, default %(default)s")
    parser.add_argument("--num_steps", type=int, default=20, help="default %(default)s")
    arguments = parser.parse_args()
    try:
        table = find_table(arguments)
    except ConfigError as error:
        report(error)
        sys.exit(2)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    count, per_copy = table.num_microbatches, table.stages_per_copy

    def loss(output: Tensor, microbatch: Microbatch) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), microbatch[1].flatten()) / count

    stages = {number: build(number % per_copy, per_copy) for number in table.stages_of(rank)}
    wrapped = {n: PlainStage(s, loss if table.next_stage(n) is None else None) for n, s in stages.items()}
    # Two copies of the weights (DualPipe) lie on mirrored ranks: their gradients are summed once a step.
    copies = {number: [n for n in range(table.num_stages) if n % per_copy == number % per_copy] for number in stages}
    groups = {m: dist.new_group([table.stage_to_rank[s] for s in range(m, table.num_stages, per_copy)])
              for m in range(per_copy)} if table.num_copies > 1 else {}  # fmt: skip
    executor = PipelineExecutor(table, wrapped, dist.group.WORLD if world_size > 1 else None)
    optimizer = torch.optim.AdamW([p for stage in stages.values() for p in stage.parameters()], lr=3e-3)
    for step in range(arguments.num_steps):
        data = microbatches(step, count)
        metrics = executor.run(data)
        for number in sorted(stages, key=lambda n: n % per_copy):
            for parameter in stages[number].parameters() if len(copies[number]) > 1 else ():
                if parameter.grad is None:  # a copy that no microbatch ran through
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=groups[number % per_copy])
        if step == 0:
            difference = torch.tensor(largest_difference(table, stages, loss, data))
            dist.all_reduce(difference, op=dist.ReduceOp.MAX)
        total = torch.as_tensor(metrics.get("loss", 0.0))
        dist.all_reduce(total)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step == 0:
            print(
                f"{table.num_stages} stages on {world_size} ranks; "
                f"the gradients differ from those of one process by {difference:.1e}"
            )
        if rank == 0 and (step % 5 == 0 or step == arguments.num_steps - 1):
            print(f"step {step + 1:3}  loss {total.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
