"""One rank of the pipeline overhead benchmark: r1mega and torch.distributed.pipelining take turns on the same stages.

    torchrun --nproc-per-node 4 -m benchmarks.pipeline_overhead_rank --case zbv:plain ...

prints one line of JSON. Both start from copies of the same stages, get the same microbatches, and must end with the
same gradients. What is timed is the CPU time of a process, all its threads, from the start of a step to its end.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torch.utils.checkpoint import checkpoint

from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.pipeline.plain import PlainStage
from r1mega.pipeline.schedules import make_table, with_recomputation, with_reductions
from r1mega.pipeline.transport import ProcessGroupTransport, Transport

# r1mega's name -> torch's. r1mega has no generator of the third from the end: it runs torch's own table.
PEERS = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "looped-bfs": "LoopedBFS",
    "zb-1p interleaved": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
DEVICE = torch.device("cpu")
OVER_GLOO = "r1mega over gloo"
Step = Callable[[], None]


class _Linear(torch.autograd.Function):
    """A linear layer as an extension would write it; its weight gradient goes to the store where there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, store: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.store = weight, store
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_input = gradient @ weight if ctx.needs_input_grad[0] else None
        if ctx.store is None:
            return grad_input, gradient.t() @ x, None
        parameter = ctx.parameter

        def add_weight_gradient() -> None:
            if parameter.grad is None:
                parameter.grad = gradient.t() @ x
            else:
                parameter.grad.addmm_(gradient.t(), x)

        ctx.store.add(add_weight_gradient)
        return grad_input, None, None


class CustomLinear(nn.Module):
    """The layer of :class:`_Linear`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Linear(width, width).weight
        self.weight_gradients = None

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.weight_gradients)


class Checkpointed(nn.Module):
    """Keeps the input of ``inner`` alone, the way that torch's users do it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def make_stages(numbers: list[int], kind: str, options: argparse.Namespace) -> dict[int, nn.Module]:
    """The stages with these numbers: small feed-forward networks that depend on their number alone."""
    stages: dict[int, nn.Module] = {}
    for number in numbers:
        torch.manual_seed(number)
        layers: list[nn.Module] = []
        for _ in range(options.num_layers):
            width = options.width
            layers += [CustomLinear(width) if kind == "custom function" else nn.Linear(width, width), nn.GELU()]
        stages[number] = nn.Sequential(*layers)
    return stages


def make_table_for(name: str, num_ranks: int, num_microbatches: int) -> Table:
    """r1mega's table, or torch's own where r1mega has none of that name: tables are data."""
    if PEERS[name] != "InterleavedZeroBubble":
        return make_table(name, num_ranks, num_microbatches)
    numbers = range(dist.get_rank(), 2 * num_ranks, num_ranks)
    stages = [PipelineStage(nn.Identity(), number, 2 * num_ranks, DEVICE) for number in numbers]
    order = get_schedule_class(PEERS[name])(stages, n_microbatches=num_microbatches).pipeline_order
    lines = (",".join(str(action or "") for action in order[rank]) for rank in range(num_ranks))
    table = Table.from_csv("\n".join(lines))
    return Table(table.stage_to_rank, with_reductions(table.rows))


def torch_step(name: str, stages: dict[int, nn.Module], table: Table, batch: Tensor, targets: Tensor) -> Step:
    """A step of torch.distributed.pipelining."""
    wrapped = [PipelineStage(stage, number, table.num_stages, DEVICE) for number, stage in stages.items()]
    schedule_class = get_schedule_class(PEERS[name])
    schedule = schedule_class(
        wrapped[0] if issubclass(schedule_class, PipelineScheduleSingle) else wrapped,
        n_microbatches=table.num_microbatches,
        loss_fn=squared_error,
        scale_grads=False,
    )
    inputs, last = (batch,) if 0 in stages else (), table.num_stages - 1 in stages

    def step() -> None:
        losses: list[Tensor] | None = [] if last else None
        schedule.step(*inputs, target=targets if last else None, losses=losses, return_outputs=False)

    return step


def r1mega_step(
    stages: dict[int, nn.Module], table: Table, batch: Tensor, targets: Tensor, transport: Transport | None = None
) -> Step:
    """A step of r1mega's executor, by default over the transport that it chooses itself."""
    last, count = table.num_stages - 1, table.num_microbatches
    microbatches = list(zip(batch.chunk(count), targets.chunk(count), strict=True))
    plain = {number: PlainStage(stage, _loss if number == last else None) for number, stage in stages.items()}
    executor = PipelineExecutor(table, plain, dist.group.WORLD, transport=transport)

    def step() -> None:
        executor.run(microbatches)

    return step


def alone_step(stages: dict[int, nn.Module], batch: Tensor, count: int) -> Step:
    """Forward and backward of each stage and microbatch, without a pipeline."""

    def step() -> None:
        for stage in stages.values():
            for microbatch in batch.chunk(count):
                stage(microbatch.detach().requires_grad_()).backward(microbatch)

    return step


def _loss(output: Tensor, microbatch: tuple[Tensor, Tensor]) -> Tensor:
    return squared_error(output, microbatch[1])


def make_sides(case: str, options: argparse.Namespace) -> tuple[dict[str, Step], dict[str, list[nn.Parameter]]]:
    """A step of each library (and of none) on stages of its own with the same weights, and their parameters."""
    name, kind = case.split(":")
    table = make_table_for(name, dist.get_world_size(), options.num_microbatches)
    numbers = table.stages_of(dist.get_rank())
    ours, over_gloo, theirs, others = (make_stages(numbers, kind, options) for _ in range(4))
    parameters = {
        side: [parameter for stage in stages.values() for parameter in stage.parameters()]
        for side, stages in (("r1mega", ours), (OVER_GLOO, over_gloo), ("torch", theirs), ("alone", others))
    }
    if kind == "checkpointing":
        table = with_recomputation(table)
        theirs, others = (
            {number: Checkpointed(stage) for number, stage in stages.items()} for stages in (theirs, others)
        )
    generator = torch.Generator().manual_seed(1)
    rows = options.num_microbatches * options.rows
    batch, targets = (torch.randn(rows, options.width, generator=generator) for _ in range(2))
    steps = {
        "r1mega": r1mega_step(ours, table, batch, targets),
        OVER_GLOO: r1mega_step(over_gloo, table, batch, targets, ProcessGroupTransport(dist.group.WORLD, DEVICE)),
        "torch": torch_step(name, theirs, table, batch, targets),
        "alone": alone_step(others, batch, options.num_microbatches),
    }
    return steps, parameters


def difference(parameters: dict[str, list[nn.Parameter]]) -> float:
    """The largest relative difference of a gradient between the two, on any rank."""
    pairs = zip(parameters["r1mega"], parameters["torch"], strict=True)
    found = [((a.grad - b.grad).abs().max() / b.grad.abs().max()).item() for a, b in pairs]
    return over_ranks(max(found), dist.ReduceOp.MAX)


def over_ranks(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    """The sum or maximum of ``value`` over all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, operation)
    return tensor.item()


def measure_case(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """CPU-seconds of a step of each side, all ranks together, one number a round."""
    steps, parameters = make_sides(case, options)
    for step in steps.values():
        step()
    found = {"difference": difference(parameters)}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    sides = list(steps)
    for _ in range(options.rounds):
        sides.append(sides.pop(0))  # nobody always comes after the same one
        for side in sides:
            for parameter in parameters[side]:
                parameter.grad = None
            gc.collect()
            dist.barrier()
            start = time.process_time()
            for _ in range(options.num_steps):
                steps[side]()
            used = time.process_time() - start
            seconds[side].append(over_ranks(used, dist.ReduceOp.SUM) / options.num_steps)
    return found | {"cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, metavar="SCHEDULE:STAGES")
    for name in ("num_microbatches", "rows", "width", "num_layers", "rounds", "num_steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found = measure_case(options.case, options)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
