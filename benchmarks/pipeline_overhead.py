"""What the pipeline executor costs: CPU-seconds of a step beside torch.distributed.pipelining, on the same stages.

    python benchmarks/pipeline_overhead.py                                # every schedule that both have, 6 minutes
    python benchmarks/pipeline_overhead.py --cases zbv:plain --rounds 3   # a first look, half a minute
    python benchmarks/pipeline_overhead.py --output benchmarks/results/pipeline_overhead.json

The stages are feed-forward networks so small that most of a step is what a pipeline adds to them. Both libraries run in
the same processes, in turn, from the same weights on the same microbatches, and their gradients are compared. A case is
SCHEDULE:STAGES. Stages are ``plain`` (torch's own layers), ``custom function`` (an autograd.Function that computes both
gradients; under r1mega it hands over that of the weight) or ``checkpointing`` (torch's checkpoint around each stage;
under r1mega recomputation as actions of the schedule).

The table has one line a case: CPU-milliseconds of a step of both, all ranks and threads together; their ratio (r1mega /
torch; the aim is 0.9 at most), the median over the rounds, with the middle half of them; and what the stages' forwards
and backwards take alone. Between ranks of one machine r1mega's messages go through shared memory, torch's over gloo;
r1mega over gloo, as between machines, stands beside them.

CPU time is not free of what else runs: on a busy machine threads disturb each other's caches and wait for each other's
locks. The load before and after is in the JSON.

Exit status: 0 where the gradients agree (whatever the ratio), 1 where they do not or a run failed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.launch import RunFailed, run_program  # noqa: E402
from benchmarks.step import Progress, machine, write_json  # noqa: E402

SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped-bfs", "zb-1p interleaved", "zbv", "dualpipev")
ZERO_BUBBLE = SCHEDULES[4:]
STAGES = ("plain", "custom function", "checkpointing")
CASES = (*(f"{name}:plain" for name in SCHEDULES), *(f"{name}:{kind}" for kind in STAGES[1:] for name in ZERO_BUBBLE))
TARGET_RATIO = 0.9
TOLERANCE = 1e-5
RUN_SECONDS = 300
OVER_GLOO = "r1mega over gloo"
SIZES = ("num_microbatches", "rows", "width", "num_layers")


def measure_case(case: str, options: argparse.Namespace) -> dict:
    """One line of the table."""
    arguments = [f"--{name}={getattr(options, name)}" for name in (*SIZES, "rounds", "num_steps")]
    program = "benchmarks.pipeline_overhead_rank"
    found = run_program(program, options.num_ranks, [f"--case={case}", *arguments], RUN_SECONDS)
    seconds = found["cpu_seconds"]
    ratios, over_gloo = (
        [ours / theirs for ours, theirs in zip(seconds[side], seconds["torch"], strict=True)]
        for side in ("r1mega", OVER_GLOO)
    )
    medians = {side: statistics.median(of_rounds) for side, of_rounds in seconds.items()}
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    all_ratios = {"ratio": quartiles[1], "ratio_quartiles": quartiles, "ratio_over_gloo": statistics.median(over_gloo)}
    return {"case": case, "median_cpu_seconds": medians} | all_ratios | found


def table(lines: list[dict]) -> str:
    """The lines as text."""
    head = [
        "schedule",
        "stages",
        "r1mega ms",
        "torch ms",
        "ratio",
        "(middle half)",
        "over gloo ms",
        "ratio",
        "stages alone ms",
        "gradients differ",
    ]
    rows = [head, *map(_row, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(line: dict) -> list[str]:
    milliseconds = {side: f"{1000 * seconds:.1f}" for side, seconds in line["median_cpu_seconds"].items()}
    low, middle, high = line["ratio_quartiles"]
    return [
        *line["case"].split(":"),
        milliseconds["r1mega"],
        milliseconds["torch"],
        f"{middle:.2f}",
        f"{low:.2f}-{high:.2f}",
        milliseconds[OVER_GLOO],
        f"{line['ratio_over_gloo']:.2f}",
        milliseconds["alone"],
        f"{line['difference']:.0e}",
    ]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=CASES, choices=CASES, metavar="SCHEDULE:STAGES", help=f"of {', '.join(CASES)}")
    add("--num_ranks", type=int, default=4, help="processes (default: %(default)s)")
    add("--num_microbatches", type=int, default=8, help="microbatches of a step (default: %(default)s)")
    add("--rows", type=int, default=16, help="rows of a microbatch (default: %(default)s)")
    add("--width", type=int, default=32, help="width of the stages (default: %(default)s)")
    add("--num_layers", type=int, default=2, help="linear layers of a stage (default: %(default)s)")
    add("--rounds", type=int, default=12, help="how often the two take turns (default: %(default)s)")
    add("--num_steps", type=int, default=5, help="steps of a turn (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write all that was measured as JSON, whole or not at all")
    arguments = parser.parse_args()
    for name in ("num_ranks", *SIZES, "rounds", "num_steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}={getattr(arguments, name)}: must be 1 or more")
    if arguments.num_ranks < 2:
        parser.error("--num_ranks=1: a pipeline needs 2 or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    progress = Progress(len(arguments.cases))
    about, lines = machine(), []
    try:
        for case in arguments.cases:
            progress.start(case)
            lines.append(measure_case(case, arguments))
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(table(lines))
    if arguments.output:
        workload = {name: getattr(arguments, name) for name in ("num_ranks", *SIZES, "rounds", "num_steps")}
        about |= {"load_average_after": os.getloadavg()[0], "workload": workload, "target_ratio": TARGET_RATIO}
        write_json(arguments.output, {**about, "cases": lines})
        print(f"written to {arguments.output}")
    reached = sum(line["ratio"] <= TARGET_RATIO for line in lines)
    print(f"{reached} of {len(lines)} cases reach the target, a ratio of {TARGET_RATIO} at most")
    differing = [line["case"] for line in lines if line["difference"] > TOLERANCE]
    if differing:
        print(f"not the same work in {', '.join(differing)}: gradients differ by more than {TOLERANCE}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
