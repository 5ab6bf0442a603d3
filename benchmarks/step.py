"""CPU-seconds of a training step: r1mega beside megatron-core, and beside the matrix products alone.

    python benchmarks/step.py                              # all five layouts, about 6 minutes on 2 cores
    python benchmarks/step.py --layouts 1,1,1 --rounds 1   # a first look, half a minute
    python benchmarks/step.py --output benchmarks/results/step.json

Both implementations train the same model from the same weights on the same tokens in float32 with Adam, one thread a
process, over gloo; they run in turn, and their losses are compared, which shows that they do the same work. A step
is 8 sequences whatever the layout; its cost is the CPU time of all ranks and threads, which other programs on
the machine disturb far less than the time on the wall. The floor is the products with the weights, measured on one core:
no implementation that calls this machine's matrix library can be faster.

The table has one line a layout: CPU-seconds per 1,000 tokens of both, their ratio (r1mega / megatron-core; the aim is 0.7
at most) with its range over the rounds, the floor, and which part of r1mega's time the floor is.

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
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.workload import Workload, add_workload_arguments, workload_from  # noqa: E402

LAYOUTS = ("1,1,1", "1,1,2", "1,2,1", "2,1,1", "1,2,2")
PROGRAMS = {"r1mega": "benchmarks.r1mega_step", "megatron-core": "benchmarks.peers.megatron_core"}
LOSS_TOLERANCE = 1e-4
TARGET_RATIO = 0.7


class RunFailed(Exception):
    """A program of the benchmark ended with an error; the message holds the end of what it wrote."""


def run_program(module: str, num_processes: int, arguments: list[str]) -> dict:
    """Run ``module`` on ``num_processes`` ranks, one thread each; the JSON that its rank 0 printed last.

    Raises:
        RunFailed: it failed or did not end within 10 minutes.
    """
    command = [sys.executable, "-m", module, *arguments]
    if num_processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        command = [sys.executable, "-m", *launcher, "-m", module, *arguments]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"{' '.join(command)} did not end within {error.timeout:.0f} seconds") from None
    if done.returncode != 0:
        raise RunFailed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def workload_arguments(workload: Workload) -> list[str]:
    return [f"--{name}={value}" for name, value in vars(workload).items()]


def per_1000_tokens(run: dict, num_warmup: int) -> list[float]:
    """CPU-seconds per 1,000 tokens of each step after the warm-up."""
    return [1000 * seconds / run["tokens_per_step"] for seconds in run["cpu_seconds"][num_warmup:]]


def measure_layout(layout: str, workload: Workload, options: argparse.Namespace, progress: Progress) -> dict:
    """One line of the table: all rounds of one layout."""
    tp, pp, ep = map(int, layout.split(","))
    world = pp * max(tp, ep)
    arguments = [f"--tp={tp}", f"--pp={pp}", f"--ep={ep}", *workload_arguments(workload)]
    progress.start(f"{layout}: floor")
    floor = run_program("benchmarks.matmul_floor", 1, arguments)
    runs: dict[str, list[dict]] = {name: [] for name in options.only}
    for number in range(1, options.rounds + 1):
        for name in runs:
            progress.start(f"{layout}: {name}, round {number} of {options.rounds}")
            runs[name].append(run_program(PROGRAMS[name], world, [*arguments, f"--num_steps={options.num_steps}"]))
    return summary(layout, world, floor, runs, options.num_warmup)


def summary(layout: str, world: int, floor: dict, runs: dict[str, list[dict]], num_warmup: int) -> dict:
    """What is known of one layout: medians over all steps of all rounds, the ratio, the agreement of the losses."""
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
        line |= {"ratio": ours / theirs, "ratio_of_rounds": of_rounds, "loss_difference": loss_difference(runs)}
    return line


def loss_difference(runs: dict[str, list[dict]]) -> list[float]:
    """By how much the losses of the two implementations differ in each step."""
    ours, theirs = (runs[name][0]["losses"] for name in PROGRAMS)
    return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]


def table(lines: list[dict]) -> str:
    """The lines as text."""
    head = ["tp,pp,ep", "ranks", "r1mega", "megatron-core", "ratio", "(rounds)", "floor", "floor/r1mega", "loss difference"]
    rows = [head]
    for line in lines:
        medians = line["cpu_seconds_per_1000_tokens"]
        row = [line["layout"]["tp_pp_ep"], str(line["layout"]["processes"])]
        row += [f"{medians[name]:.3f}" if name in medians else "-" for name in PROGRAMS]
        if "ratio" in line:
            low, high = min(line["ratio_of_rounds"]), max(line["ratio_of_rounds"])
            row += [f"{line['ratio']:.2f}", f"{low:.2f}-{high:.2f}"]
        else:
            row += ["-", "-"]
        row += [f"{line['floor']['total']:.3f}", f"{line['floor_over_r1mega']:.2f}" if "floor_over_r1mega" in line else "-"]
        row += [f"{line['loss_difference'][0]:.1e}" if "loss_difference" in line else "-"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


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
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    import r1mega

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{cpu}, {os.cpu_count()} cores",
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
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, metavar="TP,PP,EP",
                        help="layouts to measure; ranks: pp x the larger of tp and ep (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs, in turn (default: %(default)s)")
    parser.add_argument("--num_steps", type=int, default=6, help="steps of a run (default: %(default)s)")
    parser.add_argument("--num_warmup", type=int, default=2, help="steps at its start that do not count (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="measure one side alone")
    parser.add_argument("--output", type=Path, help="write everything measured to this JSON file, whole or not at all")
    add_workload_arguments(parser)
    arguments = parser.parse_args()
    if arguments.num_warmup >= arguments.num_steps:
        parser.error(f"--num_warmup={arguments.num_warmup}: must be less than --num_steps ({arguments.num_steps})")
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds}: must be 1 or more")
    for layout in arguments.layouts:
        if len(layout.split(",")) != 3 or not all(size.isdigit() and int(size) for size in layout.split(",")):
            parser.error(f"--layouts {layout}: must be three positive numbers, tp,pp,ep")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    workload = workload_from(arguments)
    progress = Progress(len(arguments.layouts) * (1 + arguments.rounds * len(arguments.only)))
    lines = []
    try:
        for layout in arguments.layouts:
            lines.append(measure_layout(layout, workload, arguments, progress))
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    print("CPU-seconds per 1,000 tokens\n" + table(lines))
    if arguments.output:
        write_json(arguments.output, {**machine(), "workload": vars(workload), "target_ratio": TARGET_RATIO, "layouts": lines})
        print(f"written to {arguments.output}")
    compared = [line for line in lines if "ratio" in line]
    if not compared:
        return 0
    reached = sum(line["ratio"] <= TARGET_RATIO for line in compared)
    print(f"{reached} of {len(compared)} layouts reach the target, a ratio of {TARGET_RATIO} at most")
    differing = [line["layout"]["tp_pp_ep"] for line in compared if line["loss_difference"][0] > LOSS_TOLERANCE]
    if differing:
        print(f"the losses of the first step differ by more than {LOSS_TOLERANCE} at {' '.join(differing)}: not the same work")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
