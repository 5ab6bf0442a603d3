"""CPU-seconds of a training step: r1mega beside megatron-core, and beside the matrix products alone.

    python benchmarks/step.py                              # all five layouts, about 10 minutes on 2 cores
    python benchmarks/step.py --layouts 1,1,1 --rounds 1   # a first look, half a minute
    python benchmarks/step.py --output benchmarks/results/step.json

Both implementations train the same model from the same weights on the same tokens in float32 with Adam, one thread a
process, over gloo; they run in turn, and their losses are compared, which shows that they do the same work. A step
is 8 sequences on each data-parallel rank; its cost is the CPU time of all ranks and threads, which other programs on
the machine disturb far less than the time on the wall. Tensor parallelism cuts the experts, too, and expert
parallelism is data parallelism of the rest. The floor is the products with the weights, measured on one core, as
r1mega multiplies here; beside it stands the floor by PyTorch's matrix library, which megatron-core uses.

The table has one line a layout: CPU-seconds per 1,000 tokens of both, their ratio (r1mega / megatron-core; the aim is
0.7 at most) with its range over the rounds, the floors, and which part of r1mega's time its floor is.

Exit status: 0 where the losses agree (whatever the ratio), 1 where they do not or a run failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.launch import RunFailed, run_program  # noqa: E402
from benchmarks.r1mega_step import model_config  # noqa: E402
from benchmarks.timing import cpu_name  # noqa: E402
from benchmarks.workload import Workload, add_workload_arguments, workload_from  # noqa: E402
from r1mega.config import ConfigError, ParallelConfig, require, validate_model_layout  # noqa: E402
from r1mega.model.blocks import place_blocks  # noqa: E402

LAYOUTS = ("1,1,1", "1,1,2", "1,2,1", "2,1,1", "1,2,2")
PROGRAMS = {"r1mega": "benchmarks.r1mega_step", "megatron-core": "benchmarks.peers.megatron_core"}
LOSS_TOLERANCE = 1e-4
TARGET_RATIO = 0.7
RUN_SECONDS = 600


def parse_layout(text: str, workload: Workload) -> ParallelConfig:
    """``tp,pp,ep`` as a layout that the workload can have. Raises :class:`ConfigError`."""
    sizes = [int(size) if size.isdigit() else 0 for size in text.split(",")]
    require(len(sizes) == 3 and min(sizes) > 0, "layouts", text, "must be three positive numbers, tp,pp,ep")
    tp, pp, ep = sizes
    parallel = ParallelConfig(tp=tp, pp=pp, ep=ep, etp=tp)
    config = model_config(workload)
    validate_model_layout(config, parallel)
    place_blocks(config, parallel, workload.sequence_length, pp)
    return parallel


def workload_arguments(workload: Workload) -> list[str]:
    return [f"--{name}={value}" for name, value in vars(workload).items()]


def per_1000_tokens(run: dict, num_warmup: int) -> list[float]:
    """CPU-seconds per 1,000 tokens of each step after the warm-up."""
    return [1000 * seconds / run["tokens_per_step"] for seconds in run["cpu_seconds"][num_warmup:]]


def measure_layout(layout: str, workload: Workload, options: argparse.Namespace, progress: Progress) -> dict:
    """One line of the table: all rounds of one layout."""
    parallel = parse_layout(layout, workload)
    world = parallel.tp * parallel.pp * parallel.ep
    sizes = [f"--{name}={getattr(parallel, name)}" for name in ("tp", "pp", "ep")]
    arguments = [*sizes, *workload_arguments(workload)]
    floors: list[dict[str, float]] = []
    runs: dict[str, list[dict]] = {name: [] for name in options.only}
    for number in range(1, options.rounds + 1):
        for name in runs:
            progress.start(f"{layout}: {name}, round {number} of {options.rounds}")
            runs[name].append(
                run_program(PROGRAMS[name], world, [*arguments, f"--num_steps={options.num_steps}"], RUN_SECONDS)
            )
        progress.start(f"{layout}: floor, round {number} of {options.rounds}")
        floors.append(run_program("benchmarks.matmul_floor", 1, arguments, RUN_SECONDS))
    floor = {part: statistics.median(found[part] for found in floors) for part in floors[0]}
    return summary(layout, world, floor, runs, options.num_warmup)


def summary(layout: str, world: int, floor: dict, runs: dict[str, list[dict]], num_warmup: int) -> dict:
    """What is known of one layout: medians over all steps of all rounds, the ratio, the agreement of the losses.

    The ratio is the median of those of the rounds: the two runs of a round stand next to each other in time, so what
    else the machine does weighs on both.
    """
    steps = {name: [per_1000_tokens(run, num_warmup) for run in of_name] for name, of_name in runs.items()}
    medians = {name: statistics.median(sum(rounds, [])) for name, rounds in steps.items()}
    line = {
        "layout": {"tp_pp_ep": layout, "processes": world},
        "cpu_seconds_per_1000_tokens": medians,
        "floor": floor,
        "runs": runs,
    }
    ours, theirs = medians.get("r1mega"), medians.get("megatron-core")
    if ours:
        line["floor_over_r1mega"] = floor["total"] / ours
    if ours and theirs:
        pairs = zip(steps["r1mega"], steps["megatron-core"], strict=True)
        of_rounds = [statistics.median(a) / statistics.median(b) for a, b in pairs]
        line |= {
            "ratio": statistics.median(of_rounds),
            "ratio_of_rounds": of_rounds,
            "loss_difference": loss_difference(runs),
        }
    return line


def loss_difference(runs: dict[str, list[dict]]) -> list[float]:
    """By how much the losses of the two implementations differ in each step."""
    ours, theirs = (runs[name][0]["losses"] for name in PROGRAMS)
    return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]


def table(lines: list[dict]) -> str:
    """The lines as text."""
    head = [
        "tp,pp,ep",
        "ranks",
        *PROGRAMS,
        "ratio",
        "(rounds)",
        "floor",
        "PyTorch's",
        "floor/r1mega",
        "loss difference",
    ]
    rows = [head, *map(_row, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(line: dict) -> list[str]:
    medians = line["cpu_seconds_per_1000_tokens"]
    both = "ratio" in line
    of_rounds = line["ratio_of_rounds"] if both else []
    return [
        line["layout"]["tp_pp_ep"],
        str(line["layout"]["processes"]),
        *(f"{medians[name]:.3f}" if name in medians else "-" for name in PROGRAMS),
        f"{line['ratio']:.2f}" if both else "-",
        f"{min(of_rounds):.2f}-{max(of_rounds):.2f}" if both else "-",
        f"{line['floor']['total']:.3f}",
        f"{line['floor']['total by PyTorch']:.3f}",
        f"{line['floor_over_r1mega']:.2f}" if "r1mega" in medians else "-",
        f"{line['loss_difference'][0]:.1e}" if both else "-",
    ]


class Progress:
    """Says on stderr what runs, how far the benchmark is, and how long it will take."""

    def __init__(self, total: int) -> None:
        self.total, self.started, self.begin = total, 0, time.monotonic()

    def start(self, what: str) -> None:
        elapsed = time.monotonic() - self.begin
        left = f", about {elapsed / self.started * (self.total - self.started):.0f} s left" if self.started else ""
        self.started += 1
        print(f"[{self.started}/{self.total}] {what}{left}", file=sys.stderr, flush=True)


def machine() -> dict:
    """What the numbers depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    import r1mega

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": cpu_name(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "r1mega": r1mega.__version__, **versions},
    }


def write_json(path: Path, content: dict) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        try:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    layouts_help = f"layouts to measure; ranks: tp x pp x ep (default: {' '.join(LAYOUTS)})"
    add("--layouts", nargs="+", default=LAYOUTS, metavar="TP,PP,EP", help=layouts_help)
    add("--rounds", type=int, default=3, help="how often each side runs, in turn (default: %(default)s)")
    add("--num_steps", type=int, default=6, help="steps of a run (default: %(default)s)")
    add("--num_warmup", type=int, default=2, help="steps at its start that do not count (default: %(default)s)")
    add("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="measure one side alone")
    add("--output", type=Path, metavar="FILE", help="write all that was measured as JSON, whole or not at all")
    add_workload_arguments(parser)
    arguments = parser.parse_args()
    if arguments.num_warmup >= arguments.num_steps:
        parser.error(f"--num_warmup={arguments.num_warmup}: must be less than --num_steps ({arguments.num_steps})")
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: must be 1 or more")
    try:
        for layout in arguments.layouts:
            parse_layout(layout, workload_from(arguments))
    except ConfigError as error:
        parser.error(str(error))
    return arguments


def main() -> int:
    arguments = parse_arguments()
    workload = workload_from(arguments)
    progress = Progress(len(arguments.layouts) * arguments.rounds * (1 + len(arguments.only)))
    lines = []
    try:
        for layout in arguments.layouts:
            lines.append(measure_layout(layout, workload, arguments, progress))
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    print("CPU-seconds per 1,000 tokens\n" + table(lines))
    if arguments.output:
        about = {**machine(), "workload": vars(workload), "target_ratio": TARGET_RATIO}
        write_json(arguments.output, {**about, "layouts": lines})
        print(f"written to {arguments.output}")
    compared = [line for line in lines if "ratio" in line]
    if not compared:
        return 0
    reached = sum(line["ratio"] <= TARGET_RATIO for line in compared)
    print(f"{reached} of {len(compared)} layouts reach the target, a ratio of {TARGET_RATIO} at most")
    differing = [line["layout"]["tp_pp_ep"] for line in compared if line["loss_difference"][0] > LOSS_TOLERANCE]
    if differing:
        print(
            f"not the same work at {' '.join(differing)}: losses of the first step differ by more than {LOSS_TOLERANCE}"
        )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
