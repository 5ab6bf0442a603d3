"""torch.distributed.pipelining under the sleeping stages of the bubble benchmark; the program of one rank.

    torchrun --nproc-per-node 4 -m benchmarks.peers.torch_pipelining --schedules 1f1b zbv

prints one line of JSON: for each schedule of :data:`SCHEDULES` its bubble, the times of its actions, and the bubble
that r1mega's simulator gives torch's own table. ``InterleavedZeroBubble`` with one stage a rank is ZB-H1.

Each half of a backward is an autograd function of its own here, since of a single one torch computes both halves
twice under zero bubble. On stage 0 torch does nothing in I, and sleeps for I and W in W.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from benchmarks.pipeline_rank import argument_parser, finish, microbatches, say, start
from benchmarks.pipeline_stages import Clock, Moment, Recorder, rates, time_steps
from r1mega.pipeline.actions import Action, Kind, Overlap, Table
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.simulator import simulate

# r1mega's name -> torch's name, stages of a rank
SCHEDULES = {
    "gpipe": ("GPipe", 1),
    "1f1b": ("1F1B", 1),
    "interleaved": ("Interleaved1F1B", 2),
    "looped-bfs": ("LoopedBFS", 2),
    "zb-h1": ("InterleavedZeroBubble", 1),
    "zbv": ("ZBVZeroBubble", 2),
    "dualpipev": ("DualPipeV", 2),
}
V_SHAPED = ("zbv", "dualpipev")


class SleepingStage(nn.Module):
    """As :class:`benchmarks.pipeline_stages.SleepingStage`, for torch: tensor in, tensor out."""

    def __init__(self, number: int, seconds: Sequence[float], hidden_size: int, recorder: Recorder) -> None:
        super().__init__()
        self.number, self.recorder = number, recorder
        self.seconds = dict(zip((Kind.F, Kind.I, Kind.W), seconds, strict=True))
        self.weight = nn.Parameter(torch.zeros(hidden_size, device=recorder.clock.device))

    def sleep(self, kind: Kind, begin: Moment) -> None:
        """End an action that began then."""
        self.recorder.clock.sleep(self.seconds[kind])
        self.recorder.note(kind, self.number, 0, begin)

    def forward(self, x: Tensor) -> Tensor:
        begin = self.recorder.clock.now()
        given = x if x.requires_grad else x.detach().requires_grad_()
        output: Tensor = _SleepInput.apply(given, self) + _SleepWeight.apply(self.weight, x.shape, self)
        self.sleep(Kind.F, begin)
        return output


class _SleepInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.stage.sleep(Kind.I, ctx.stage.recorder.clock.now())
        return gradient, None


class _SleepWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, shape: torch.Size, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        return weight.expand(shape).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        begin = ctx.stage.recorder.clock.now()
        gradient = gradient.flatten(0, -2).sum(0)
        ctx.stage.sleep(Kind.W, begin)
        return gradient, None, None


def stage_numbers(name: str, rank: int, num_ranks: int) -> list[int]:
    """The stages that ``rank`` holds."""
    if name in V_SHAPED:
        return [rank, 2 * num_ranks - 1 - rank]
    return [rank + chunk * num_ranks for chunk in range(SCHEDULES[name][1])]


def measure(name: str, arguments: argparse.Namespace, recorder: Recorder) -> dict:
    """Time one schedule; the result is whole on rank 0 only. Raises ValueError where torch refuses it."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch_name, chunks = SCHEDULES[name]
    seconds = [milliseconds / 1e3 for milliseconds in arguments.milliseconds]
    device = recorder.clock.device
    stages = [
        PipelineStage(
            SleepingStage(number, seconds, arguments.hidden_size, recorder), number, chunks * num_ranks, device
        )
        for number in stage_numbers(name, rank, num_ranks)
    ]
    schedule = get_schedule_class(torch_name)(
        stages if issubclass(get_schedule_class(torch_name), PipelineScheduleMulti) else stages[0],
        n_microbatches=arguments.microbatches,
        loss_fn=lambda output, _: output.mean(),
    )
    data = torch.cat([tensor for _, tensor in microbatches(arguments, device)])
    inputs = (data,) if any(stage.is_first for stage in stages) else ()
    target = data if any(stage.is_last for stage in stages) else None

    def step() -> None:
        schedule.step(*inputs, target=target, return_outputs=False)

    timed = time_steps(step, recorder, arguments.num_warmup, arguments.num_steps)
    if not timed:
        return {}
    found = rates(timed) | _simulated(schedule, seconds, num_ranks)
    say(f"{name}: bubble {found['bubble_rate']:.1%}, whole step {found['bubble_rate_makespan']:.1%}")
    return found


def _simulated(schedule: Any, seconds: Sequence[float], num_ranks: int) -> dict:
    """The bubble of torch's own table; nothing for GPipe and 1F1B, where torch does not run its table."""
    if not isinstance(schedule, PipelineScheduleMulti):
        return {}
    order = schedule.pipeline_order
    rows = [[_cell(action) for action in order[rank] if action is not None] for rank in range(num_ranks)]
    owners = {action.stage: rank for rank in range(num_ranks) for action in Table([], rows).actions(rank)}
    simulation = simulate(Table([owners[stage] for stage in sorted(owners)], rows), Costs(*seconds))
    rates_of_table = {"bubble_rate": simulation.bubble_rate, "bubble_rate_makespan": simulation.bubble_rate_makespan}
    return {"simulated": rates_of_table}


def _cell(action: Any) -> Action | Overlap:
    if action.sub_actions is not None:
        return Overlap(*(_cell(part) for part in action.sub_actions))  # type: ignore[arg-type]
    return Action(Kind(action.computation_type.value), action.stage_index, action.microbatch_index)


def main() -> None:
    arguments = argument_parser(__doc__ or "").parse_args()
    warnings.filterwarnings("ignore", module=r"torch\.")
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.ERROR)
    recorder = Recorder(Clock(start(arguments)))
    results = {}
    for name in arguments.schedules:
        try:
            results[name] = measure(name, arguments, recorder)
        except ValueError as error:  # on all ranks, before anything ran: so torch refuses numbers that do not divide
            results[name] = {"refused": str(error).splitlines()[0]}
            say(f"{name}: torch refuses it: {error}")
    finish(results)


if __name__ == "__main__":
    main()
