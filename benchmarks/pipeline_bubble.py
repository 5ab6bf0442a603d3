"""The bubble of every pipeline schedule: measured on real ranks, beside the simulated one and beside torch's library.

    python benchmarks/pipeline_bubble.py                                # all schedules, about 6 minutes
    python benchmarks/pipeline_bubble.py --schedules 1f1b zbv           # a first look, about a minute
    python benchmarks/pipeline_bubble.py --ranks 2 --microbatches 6 --milliseconds 40 50 30
    python benchmarks/pipeline_bubble.py --output benchmarks/results/pipeline_bubble.json --png bubble.png

Three parts (--parts):
  sleeping   r1mega's executor over processes, with stages that sleep instead of computing: F, I and W of every stage
             take the given milliseconds, a B takes I and W. So four ranks show their true bubble even on two cores.
             torch.distributed.pipelining runs the same sleeps in the schedules that it has; each side is held against
             the simulation of its own table.
  counted    the bytes that each rank holds for backward at its peak (saved tensors, and what deferred weight gradients
             keep) with stages of gated layers, beside the simulated peak times the bytes of one microbatch.
  computing  the bubble with these layers, at their real speed. No more ranks than cores or GPUs, so that each has its
             own; the simulation takes the mean times of the actions of the run itself.

The bubble is the share of time that ranks idle, each counted for as long as the longest one takes from its first action
to its last (Zero Bubble's definition); the JSON has the one over the whole step, too. Actions are timed inside the
stages, so waiting, messages and Python all count as bubble. The simulation knows no communication. Medians of the
steps; the ends of their range in brackets. On a machine with enough GPUs everything runs on them over NCCL.

Ranks that sleep are disturbed by all that runs beside them: use a calm machine, or --real_time. What a library adds
to an action does not depend on how long it takes, so the longer the sleeps (--milliseconds), the smaller its share.

Exit status: 0 where everything ran, whatever the numbers; 1 where a run failed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.launch import RunFailed, run_program  # noqa: E402
from r1mega.files import write_whole  # noqa: E402
from r1mega.pipeline.actions import Kind  # noqa: E402
from r1mega.pipeline.costs import Costs  # noqa: E402
from r1mega.pipeline.schedules import SCHEDULES, make_table  # noqa: E402
from r1mega.pipeline.simulator import Simulation, simulate  # noqa: E402

PARTS = ("sleeping", "counted", "computing")
R1MEGA, TORCH = "benchmarks.pipeline_rank", "benchmarks.peers.torch_pipelining"
IN_TORCH = ("gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zbv", "dualpipev")
TARGET_POINTS, TARGET_BYTES = 1.5, 0.05
RUN_SECONDS = 1800
MIB = 2**20


def of_rank(name: str, num_ranks: int, options: argparse.Namespace, times: dict[str, float]) -> Simulation:
    """The simulation of a schedule whose stages take ``times`` (of F, I, W)."""
    table = make_table(name, num_ranks, options.microbatches)
    return simulate(table, Costs(times["F"], times["I"], times["W"]))


def sleeping(options: argparse.Namespace, progress: Progress) -> dict[str, dict]:
    """For each schedule the bubble: simulated, measured, and torch's."""
    times = ["--milliseconds", *map(str, options.milliseconds), *(["--real_time"] if options.real_time else [])]
    progress.start("sleeping stages: r1mega")
    ours = run_program(
        R1MEGA,
        options.ranks,
        ["--stages=sleeping", *times, *_common(options, options.schedules)],
        RUN_SECONDS,
        progress=True,
    )
    both = [name for name in options.schedules if name in IN_TORCH and not options.without_torch]
    theirs: dict[str, dict] = {}
    if both:
        progress.start("sleeping stages: torch.distributed.pipelining")
        theirs = run_program(TORCH, options.ranks, [*times, *_common(options, both)], RUN_SECONDS, progress=True)
    found = {}
    for name in options.schedules:
        seconds = {kind: milliseconds / 1e3 for kind, milliseconds in zip("FIW", options.milliseconds, strict=True)}
        simulation = of_rank(name, options.ranks, options, seconds)
        found[name] = {"simulated": _rates(simulation), "r1mega": ours[name]}
        if name in theirs:
            found[name]["torch"] = {"simulated": _rates(simulation)} | theirs[name]
    return found


def counted(options: argparse.Namespace, progress: Progress) -> dict[str, dict]:
    """For each schedule the bytes held at the peak by rank, measured and simulated."""
    progress.start("bytes held for backward")
    sizes = ["--tokens=256", "--hidden_size=128", "--width=512"]
    ours = run_program(
        R1MEGA,
        options.ranks,
        ["--stages=counted", *_common(options, options.schedules), *sizes],
        RUN_SECONDS,
        progress=True,
    )
    for name, line in ours.items():
        simulation = of_rank(name, options.ranks, options, dict.fromkeys("FIW", 1.0))
        line["simulated_peak_activations"] = simulation.peak_activations
        line["simulated_peak_bytes"] = [peak * line["bytes_of_microbatch"] for peak in simulation.peak_activations]
    return ours


def computing(options: argparse.Namespace, progress: Progress) -> dict[str, dict]:
    """For each schedule the bubble with layers that compute, beside the one simulated from their times."""
    ranks = options.computing_ranks
    names = [name for name in options.schedules if _refusal(name, ranks, options.microbatches) is None]
    progress.start(f"computing stages on {ranks} ranks")
    sizes = [f"--tokens={options.tokens}", f"--hidden_size={options.hidden_size}", f"--width={2 * options.hidden_size}"]
    ours = run_program(
        R1MEGA, ranks, ["--stages=computing", *_common(options, names), *sizes], RUN_SECONDS, progress=True
    )
    found = {}
    for name, line in ours.items():
        means = line["mean_seconds"]
        times = {kind: means.get(kind, 0.0) for kind in "FIW"}
        if Kind.I not in means:
            times[Kind.I] = means[Kind.B]  # a B costs I and W together
        found[name] = {"simulated": _rates(of_rank(name, ranks, options, times)), "r1mega": line}
    return found


def _common(options: argparse.Namespace, names: list[str]) -> list[str]:
    """Flags that all programs of ranks understand."""
    steps = [f"--{name}={getattr(options, name)}" for name in ("microbatches", "num_steps", "num_warmup", "device")]
    return [*steps, "--schedules", *names]


def _rates(simulation: Simulation) -> dict[str, float]:
    return {name: getattr(simulation, name) for name in ("bubble_rate", "bubble_rate_makespan")}


def points(measured: dict[str, Any], simulated: dict[str, Any]) -> float:
    """By how many percentage points the measured bubble is above the simulated one."""
    return 100 * (measured["bubble_rate"] - simulated["bubble_rate"])


def bytes_off(line: dict[str, Any]) -> float:
    """By which share the bytes of the rank that is farthest off differ from the simulated ones, with its sign."""
    pairs = zip(line["peak_bytes"], line["simulated_peak_bytes"], strict=True)
    return max((measured / simulated - 1 for measured, simulated in pairs), key=abs)


def table(results: dict[str, dict[str, dict]]) -> str:
    """What was measured, a line a schedule."""
    timed, held, computed = (results.get(part, {}) for part in PARTS)
    head = ["schedule"]
    head += ["simulated", "measured", "(steps)", "points off", "torch", "points off"] if timed else []
    head += ["peak", "simulated", "measured MiB by rank", "off"] if held else []
    head += ["computing: simulated", "measured", "points off"] if computed else []
    rows = [head]
    for name in dict.fromkeys([*timed, *held, *computed]):
        row = [name]
        row += _bubble_cells(timed[name]) + _torch_cells(timed[name].get("torch")) if timed else []
        row += _byte_cells(held[name]) if held else []
        row += [cell for i, cell in enumerate(_bubble_cells(computed.get(name))) if i != 2] if computed else []
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(lines)


def _bubble_cells(line: dict | None) -> list[str]:
    if line is None:
        return ["-"] * 4
    ours, simulated = line["r1mega"], line["simulated"]
    of_steps = ours["bubble_rate_of_steps"]
    return [
        f"{simulated['bubble_rate']:.2%}",
        f"{ours['bubble_rate']:.2%}",
        f"({100 * min(of_steps):.1f}-{100 * max(of_steps):.1f})",
        f"{points(ours, simulated):+.2f}",
    ]


def _torch_cells(theirs: dict | None) -> list[str]:
    if theirs is None:
        return ["-", "-"]
    if "refused" in theirs:
        return ["refused", "-"]
    return [f"{theirs['bubble_rate']:.2%}", f"{points(theirs, theirs['simulated']):+.2f}"]


def _byte_cells(line: dict) -> list[str]:
    return [
        f"{max(line['simulated_peak_activations']):.2f}",
        " ".join(f"{number / MIB:.1f}" for number in line["simulated_peak_bytes"]),
        " ".join(f"{number / MIB:.1f}" for number in line["peak_bytes"]),
        f"{bytes_off(line):+.1%}",
    ]


def verdict(results: dict[str, dict[str, dict]]) -> list[str]:
    """Which targets were met, a sentence each."""
    sentences = []
    if timed := results.get("sleeping"):
        off = {name: abs(points(line["r1mega"], line["simulated"])) for name, line in timed.items()}
        met = sum(value <= TARGET_POINTS for value in off.values())
        sentences.append(f"{met} of {len(off)} bubbles are within {TARGET_POINTS} points of the simulated one")
        both = {name: line["torch"] for name, line in timed.items() if "bubble_rate" in line.get("torch", {})}
        closer = sum(off[name] < abs(points(line, line["simulated"])) for name, line in both.items())
        if both:
            sentences.append(f"{closer} of the {len(both)} that torch has, too, are closer than torch's")
    if held := results.get("counted"):
        met = sum(abs(bytes_off(line)) <= TARGET_BYTES for line in held.values())
        sentences.append(f"{met} of {len(held)} peaks are within {TARGET_BYTES:.0%} of the simulated one on every rank")
    return sentences


class Progress:
    """Says on stderr which part runs, and when it began."""

    def __init__(self, total: int) -> None:
        self.total, self.started, self.begin = total, 0, time.monotonic()

    def start(self, what: str) -> None:
        self.started += 1
        elapsed = time.monotonic() - self.begin
        print(f"[{self.started}/{self.total}] {elapsed:3.0f} s: {what}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    import r1mega

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "r1mega": r1mega.__version__,
            "torch": importlib.metadata.version("torch"),
        },
    }


def _refusal(name: str, num_ranks: int, num_microbatches: int) -> str | None:
    """Why a schedule cannot run, if so."""
    try:
        make_table(name, num_ranks, num_microbatches)
    except ValueError as error:
        return str(error)
    return None


def _may_have_real_time() -> bool:
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=4, help="of the pipeline (default: %(default)s)")
    add("--microbatches", type=int, default=8, help="of a step (default: %(default)s)")
    times_help = "how long a stage sleeps for one microbatch (default: 40 40 40)"
    add("--milliseconds", type=float, nargs=3, default=[40.0, 40.0, 40.0], metavar=("F", "I", "W"), help=times_help)
    schedules_help = f"of {' '.join(SCHEDULES)} (default: all that can run)"
    add("--schedules", nargs="+", metavar="NAME", help=schedules_help)
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    add("--num_steps", type=int, default=5, help="timed steps of each schedule (default: %(default)s)")
    add("--num_warmup", type=int, default=1, help="steps before them (default: %(default)s)")
    add("--real_time", action="store_true", help="ranks that sleep go before other programs (needs root)")
    add("--without_torch", action="store_true", help="do not measure torch.distributed.pipelining")
    add("--computing_ranks", type=int, help="ranks of the part 'computing' (default: at most the cores or GPUs)")
    add("--tokens", type=int, default=512, help="of a microbatch of the part 'computing' (default: %(default)s)")
    add("--hidden_size", type=int, default=256, help="of its layers (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where there are enough")
    add("--output", type=Path, metavar="FILE", help="write all that was measured as JSON, whole or not at all")
    add("--png", type=Path, metavar="FILE", help="draw it")
    options = parser.parse_args(argv)
    for name in ("ranks", "microbatches", "num_steps", "tokens", "hidden_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: must be 1 or more")
    if options.ranks < 2:
        parser.error("--ranks=1: a pipeline has a bubble from 2 ranks on")
    if options.num_warmup < 1:
        parser.error(f"--num_warmup={options.num_warmup}: must be 1 or more: in the first step messages are slower")
    if min(options.milliseconds) <= 0:
        parser.error(f"--milliseconds {options.milliseconds}: must be more than 0")
    for name in options.schedules or ():
        if (refusal := _refusal(name, options.ranks, options.microbatches)) is not None:
            parser.error(f"--schedules {name}: {refusal}")
    if options.real_time and not _may_have_real_time():
        parser.error("--real_time: this user may not have real-time priority; run as root, or without it")
    for path in (options.output, options.png):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if options.schedules is None:
        options.schedules = [n for n in SCHEDULES if _refusal(n, options.ranks, options.microbatches) is None]
    return options


def choose_device(options: argparse.Namespace) -> None:
    """Settle ``device`` and ``computing_ranks``. torch is not needed before."""
    import torch

    num_gpus = torch.cuda.device_count()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() and num_gpus >= options.ranks else "cpu"
    if options.computing_ranks is None:
        places = num_gpus if options.device == "cuda" else os.cpu_count() or 1
        options.computing_ranks = max(2, min(options.ranks, places))


def main() -> int:
    options = parse_arguments()
    choose_device(options)
    about = machine()
    with_torch = not options.without_torch and any(name in IN_TORCH for name in options.schedules)
    progress = Progress(len(options.parts) + ("sleeping" in options.parts and with_torch))
    measure = {"sleeping": sleeping, "counted": counted, "computing": computing}
    results: dict[str, dict[str, dict]] = {}
    try:
        for part in PARTS:
            if part in options.parts:
                results[part] = measure[part](options, progress)
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(table(results))
    print("\n".join(verdict(results)))
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "png")}
    content = {**about, "settings": settings, "target_points": TARGET_POINTS, "target_bytes": TARGET_BYTES, **results}
    if options.output:
        write_whole(options.output, json.dumps(content, indent=1) + "\n")
        print(f"wrote {options.output}")
    if options.png:
        from benchmarks.bubble_chart import draw

        draw(content, options.png)
        print(f"wrote {options.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
