"""What an uneven load of the experts costs a MoE layer, and what another placement of the experts gains.

    python benchmarks/imbalance.py                                       # 2 ranks, 5 degrees of skew: a minute or two
    python benchmarks/imbalance.py --ranks 4 --skew 0 0.5 1 --redundant 8
    python benchmarks/imbalance.py --output benchmarks/results/imbalance.json    # and imbalance.png beside it

Choices are drawn so that expert e is chosen in proportion to ``(e + 1) ** -skew``: neighbouring experts, which lie on
one rank, are alike, as in a model whose balance is lost. Each rank then dispatches its tokens over gloo, runs its
experts, combines, and goes back through all of it: a step of a layer, but for its router. All ranks wait for the
busiest one. Reported are, with experts in order, placed by load, and placed with further copies of the busiest
(:mod:`r1mega.moe.placement`; with other tokens than those that decided the placement, and without the sum of the
copies' gradients):

* step: the time on the wall from a common start to the end of the last rank, forward and backward; the least of all
  turns, because what else runs on the machine can only add to it;
* CPU: the CPU time of the busiest rank in a step, that is without its waiting; the median of all turns;
* rows: those of the busiest rank's experts over the mean, as the placement foretells them.

All skews and placements take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from r1mega.parallel_state import ParallelState

SIZES = {"tokens": 1024, "hidden": 256, "experts": 32, "top_k": 4, "width": 256}
PLACEMENTS = ("in order", "placed", "placed with copies")
LIMIT_SECONDS = 600


def measure(arguments: argparse.Namespace, state: ParallelState) -> list[dict]:
    """One rank: all skews and placements; the same list on every rank."""
    import torch
    import torch.distributed as dist

    from r1mega.config import MoEConfig
    from r1mega.moe.experts import Experts
    from r1mega.moe.placement import in_order, max_over_mean, place_experts

    slots = (arguments.experts + arguments.redundant) // arguments.ranks
    experts = {}
    for num_slots in {arguments.experts, slots * arguments.ranks}:
        experts[num_slots] = Experts(arguments.hidden, MoEConfig(num_slots, arguments.top_k, arguments.width), state)
    lines, steps, cells = [], [], []
    for skew in arguments.skew:
        load = torch.bincount(_choices(arguments, skew, seed=1000).flatten(), minlength=arguments.experts).tolist()
        placements = {
            "in order": in_order(arguments.experts, arguments.ranks),
            "placed": place_experts(load, arguments.ranks, arguments.experts // arguments.ranks),
            "placed with copies": place_experts(load, arguments.ranks, slots),
        }
        experts_TK = _choices(arguments, skew, seed=state.rank)
        counts = torch.bincount(experts_TK.flatten(), minlength=arguments.experts)
        dist.all_reduce(counts)
        line = {"skew": skew, "experts_max_over_mean": max_over_mean(counts.tolist()), "placements": {}}
        for name, placement in placements.items():
            cells.append({"ranks_max_over_mean": max_over_mean(placement.load_of_ranks(counts.tolist()))})
            line["placements"][name] = cells[-1]
            num_slots = len(placement.experts[0]) * arguments.ranks
            steps.append(_step(arguments, state, experts[num_slots], num_slots, placement.slots_of(experts_TK)))
        lines.append(line)
    for cell, times in zip(cells, _times(steps, arguments), strict=True):
        cell |= times
    return lines


def _choices(arguments: argparse.Namespace, skew: float, seed: int):  # noqa: ANN202 - torch is not imported yet
    """``[T, K]`` different experts for each token."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    likely = torch.arange(1, arguments.experts + 1).float().pow(-skew)
    return torch.multinomial(likely.expand(arguments.tokens, -1), arguments.top_k, generator=generator)


def _step(arguments: argparse.Namespace, state: ParallelState, experts, num_slots: int, slots_TK) -> Callable[[], None]:  # noqa: ANN001
    """A forward and backward of this rank's tokens."""
    import torch

    from r1mega.moe.dispatcher import AllToAllDispatcher, routing_of

    dispatcher = AllToAllDispatcher(num_slots, state.group("ep"))
    x_TH = torch.randn(arguments.tokens, arguments.hidden, requires_grad=True)
    weights_TK = torch.rand(slots_TK.shape, requires_grad=True)
    grad_TH = torch.randn_like(x_TH)

    def step() -> None:
        d = dispatcher.dispatch(x_TH, routing_of(slots_TK, weights_TK, num_slots))
        dispatcher.combine(experts(d.rows, d.weights, d.counts), d).backward(grad_TH)

    return step


def _times(steps: list[Callable[[], None]], arguments: argparse.Namespace) -> list[dict]:
    """For each step seconds on the wall, of the last rank, and CPU-seconds of each rank; all take turns."""
    import torch
    import torch.distributed as dist

    measured = torch.empty(2, arguments.num_steps + 1, len(steps), dtype=torch.float64)
    for turn in range(arguments.num_steps + 1):
        if dist.get_rank() == 0:
            print(f"[{turn}/{arguments.num_steps}]", file=sys.stderr, flush=True)
        for index, step in enumerate(steps):
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            measured[:, turn, index] = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu])
    everyone = [torch.empty_like(measured) for _ in range(arguments.ranks)]
    dist.all_gather(everyone, measured)
    measured_R2NS = torch.stack(everyone)[:, :, 1:]  # the first turn warms up
    walls = measured_R2NS[:, 0].amax(0).amin(0).tolist()
    cpus = measured_R2NS[:, 1].median(1).values.t().tolist()
    return [{"step_seconds": wall, "cpu_seconds_of_ranks": cpu} for wall, cpu in zip(walls, cpus, strict=True)]


def plot(lines: list[dict], path: Path) -> None:
    """Time of a step, CPU time of the busiest rank, and its load over the mean, by skew."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    skews = [line["skew"] for line in lines]
    for name in PLACEMENTS:
        found = [line["placements"][name] for line in lines]
        left.plot(skews, [1e3 * each["step_seconds"] for each in found], marker="o", label=name)
        middle.plot(skews, [1e3 * max(each["cpu_seconds_of_ranks"]) for each in found], marker="o", label=name)
        right.plot(skews, [each["ranks_max_over_mean"] for each in found], marker="o", label=name)
    left.set_ylabel("ms of a step, forward and backward")
    middle.set_ylabel("CPU-ms of the busiest rank in a step")
    for axes in (left, middle):
        axes.set_ylim(bottom=0)
    right.set_ylabel("rows of the busiest rank over the mean")
    for axes in (left, middle, right):
        axes.set_xlabel("skew s: expert e chosen as (e + 1)^-s")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def table(lines: list[dict]) -> str:
    """The lines as text."""
    rows = [" " * 23 + "".join(f"{name:>30}" for name in PLACEMENTS)]
    rows.append(f"{'skew':>5}{'experts max/mean':>18}" + f"{'step ms':>12}{'CPU ms':>10}{'rows':>8}" * len(PLACEMENTS))
    for line in lines:
        row = f"{line['skew']:5.2f}{line['experts_max_over_mean']:18.2f}"
        for cell in (line["placements"][name] for name in PLACEMENTS):
            times = f"{1e3 * cell['step_seconds']:12.2f}{1e3 * max(cell['cpu_seconds_of_ranks']):10.2f}"
            row += f"{times}{cell['ranks_max_over_mean']:8.2f}"
        rows.append(row)
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="of the expert-parallel group, default %(default)s")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    skew_help = "degrees of skew, default: 0 0.25 0.5 0.75 1"
    parser.add_argument("--skew", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help=skew_help)
    parser.add_argument("--redundant", type=int, default=8, help="further copies of experts, default %(default)s")
    parser.add_argument("--num_steps", type=int, default=60, help="timed steps of each, default %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON, and a picture beside it")
    arguments = parser.parse_args()
    for name in ("experts", "redundant"):
        if getattr(arguments, name) % arguments.ranks:
            parser.error(f"--{name}={getattr(arguments, name)}: must be a multiple of --ranks ({arguments.ranks})")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from benchmarks.launch import RunFailed, ran_as_rank, run_program
    from benchmarks.timing import about
    from r1mega.files import write_whole

    if ran_as_rank(lambda state: measure(arguments, state)):
        return 0
    try:
        lines = run_program("benchmarks.imbalance", arguments.ranks, sys.argv[1:], LIMIT_SECONDS, progress=True)
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(table(lines))
    if arguments.output:
        import torch

        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        content = {**about(torch.device("cpu")), "settings": settings, "lines": lines}
        write_whole(arguments.output, json.dumps(content, indent=1) + "\n")
        plot(lines, arguments.output.with_suffix(".png"))
        print(f"written to {arguments.output} and {arguments.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
