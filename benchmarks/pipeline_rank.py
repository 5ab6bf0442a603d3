"""r1mega's executor under the stages of the bubble benchmark; the program of one rank.

    torchrun --nproc-per-node 4 -m benchmarks.pipeline_rank --stages sleeping --schedules 1f1b zbv

prints one line of JSON: for each schedule its bubble and the times of its actions (``--stages sleeping`` and
``computing``), or the bytes that each rank holds for backward at its peak (``--stages counted``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.pipeline_stages import Clock, GatedStage, Microbatch, Recorder, SleepingStage, rates, time_steps
from benchmarks.saved_bytes import SavedBytes
from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.pipeline.schedules import make_table

TIMEOUT = datetime.timedelta(seconds=120)


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what the programs of all implementations understand."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--schedules", nargs="+", required=True, help="in r1mega's names")
    add("--microbatches", type=int, default=8, help="of a step (default: %(default)s)")
    add("--milliseconds", type=float, nargs=3, default=(40, 40, 40), metavar=("F", "I", "W"), help="sleep of a stage")
    add("--num_steps", type=int, default=5, help="timed steps of each schedule (default: %(default)s)")
    add("--num_warmup", type=int, default=1, help="steps before them (default: %(default)s)")
    add("--tokens", type=int, default=64, help="rows of the tensors that travel (default: %(default)s)")
    add("--hidden_size", type=int, default=64, help="their width (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--real_time", action="store_true", help="go before other programs; only for stages that sleep")
    return parser


def start(arguments: argparse.Namespace) -> torch.device:
    """Join torchrun's world: gloo, and NCCL for tensors on a GPU. The device of this rank."""
    if arguments.real_time:  # before gloo starts its threads, which inherit it
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    if arguments.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        dist.init_process_group("gloo", timeout=TIMEOUT)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    return device


def finish(results: dict[str, dict]) -> None:
    """Print what rank 0 has found; leave the world."""
    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def say(text: str) -> None:
    """Progress, from rank 0."""
    if dist.get_rank() == 0:
        print(f"  {text}", file=sys.stderr, flush=True)


def microbatches(arguments: argparse.Namespace, device: torch.device) -> list[Microbatch]:
    shape = (arguments.tokens, arguments.hidden_size)
    return [(i, torch.randn(shape, device=device)) for i in range(arguments.microbatches)]


def stages_of(
    table: Table, arguments: argparse.Namespace, recorder: Recorder, num_layers: int | None
) -> dict[int, nn.Module]:
    """This rank's stages. Where they compute, they are parts of a rank's share of the model.

    Args:
        table: the schedule.
        arguments: of the program.
        recorder: is told of the actions.
        num_layers: layers of a rank's share of the model; None for stages that sleep.
    """
    stages: dict[int, nn.Module] = {}
    for number in table.stages_of(dist.get_rank()):
        is_last = table.next_stage(number) is None
        if num_layers is None:
            seconds = [milliseconds / 1e3 for milliseconds in arguments.milliseconds]
            stages[number] = SleepingStage(number, is_last, seconds, arguments.hidden_size, recorder)
        else:
            layers = num_layers * table.num_ranks // table.stages_per_copy
            stages[number] = GatedStage(number, is_last, layers, arguments.hidden_size, arguments.width, recorder)
    return stages


def measure(name: str, arguments: argparse.Namespace, recorder: Recorder) -> dict:
    """Time one schedule; the result is whole on rank 0 only."""
    table = make_table(name, dist.get_world_size(), arguments.microbatches)
    num_layers = None if arguments.stages == "sleeping" else arguments.num_layers
    stages = stages_of(table, arguments, recorder, num_layers)
    executor = PipelineExecutor(table, stages, dist.group.WORLD)
    data = microbatches(arguments, recorder.clock.device)
    timed = time_steps(lambda: executor.run(data), recorder, arguments.num_warmup, arguments.num_steps)
    if not timed:
        return {}
    found = rates(timed)
    say(f"{name}: bubble {found['bubble_rate']:.1%}, whole step {found['bubble_rate_makespan']:.1%}")
    return found


def count_bytes(name: str, arguments: argparse.Namespace, recorder: Recorder) -> dict:
    """Bytes held for backward at each rank's peak, in a step after the warm-up; whole on rank 0 only."""
    table = make_table(name, dist.get_world_size(), arguments.microbatches)
    stages = stages_of(table, arguments, recorder, arguments.num_layers)
    executor = PipelineExecutor(table, stages, dist.group.WORLD)
    data = microbatches(arguments, recorder.clock.device)
    bytes_of_stage = _bytes_of(next(iter(stages.values())), data[0])
    for _ in range(arguments.num_warmup):
        executor.run(data)
    saved = SavedBytes()
    dist.barrier()
    with saved.counting(executor.weight_gradients):
        executor.run(data)
    recorder.take()
    left = saved.live
    rows: list[tuple[int, int]] | None = [(0, 0)] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object((saved.peak, left), rows)
    if rows is None:
        return {}
    peaks, left_over = map(list, zip(*rows, strict=True))
    say(f"{name}: {max(peaks) / 2**20:.2f} MiB at the peak")
    one = bytes_of_stage * table.stages_per_copy // table.num_ranks
    return {"bytes_of_microbatch": one, "peak_bytes": peaks, "bytes_after_step": left_over}


def _bytes_of(stage: nn.Module, microbatch: Microbatch) -> int:
    """What a stage saves in the forward of one microbatch."""
    saved = SavedBytes()
    with saved.counting():
        index, data = microbatch
        output = stage((data.clone().requires_grad_(),), microbatch)
    num_bytes = saved.live
    del output, index
    return num_bytes


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--stages", choices=("sleeping", "computing", "counted"), default="sleeping")
    parser.add_argument("--num_layers", type=int, default=2, help="layers of a rank, where stages compute")
    parser.add_argument("--width", type=int, default=256, help="width of their gated layers")
    arguments = parser.parse_args()
    recorder = Recorder(Clock(start(arguments)))
    run: Callable[[str, argparse.Namespace, Recorder], dict] = count_bytes if arguments.stages == "counted" else measure
    finish({name: run(name, arguments, recorder) for name in arguments.schedules})


if __name__ == "__main__":
    main()
