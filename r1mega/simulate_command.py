"""``r1mega simulate``: times a pipeline schedule, or all of them, and draws them. Needs neither torch nor processes."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.config import ConfigError
from r1mega.files import sync, write_whole
from r1mega.pipeline.actions import Table
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.schedules import SCHEDULES, make_table, require_known, with_recomputation
from r1mega.pipeline.simulator import Simulation, simulate
from r1mega.pipeline.table_file import read_table
from r1mega.pipeline.timeline.report import compare, describe, figures, searched, verdict
from r1mega.pipeline.timeline.terminal import Terminal
from r1mega.settings import CommandParser, one_line

if TYPE_CHECKING:
    from r1mega.pipeline.auto import AutoResult

HELP = """\
Time a pipeline schedule without running it: its bubble, its makespan, what each rank holds, and when each rank does
what. --compare shows all schedules beside each other.

A cost is the time of one microbatch on one rank, in any unit: a rank that holds several stages shares it out among
them. A comma list gives a time for each stage of the model instead, from first to last, so that a heavy embedding or
head shows; a schedule with more or fewer stages cuts or joins them where the numbers divide.

examples:
  r1mega simulate --schedule zb-h1 --ranks 8 --microbatches 24 \\
      --forward 18.522 --backward_input 18.086 --backward_weight 9.337 --communication 0.601
  r1mega simulate --schedule 1f1b --ranks 4 --microbatches 16 --forward 1,1,1,1.6 --png 1f1b.png
  r1mega simulate --compare --ranks 4 --microbatches 12 --png all.png
  r1mega simulate --table mine.csv --trace mine.json

mine.csv has a line for each rank: 0F0 is the forward (F) of stage 0 for microbatch 0; B is its backward, I and W are
the backward's two halves (gradients of the input, of the weights), C computes the forward again, 0R reduces gradients:
  0F0,0F1,0B0,0B1,0R
  1F0,1B0,1F1,1B1,1R

schedules:
"""
MOST_PAIRS = 65_536  # stages times microbatches: some seconds
AUTO = "auto"
COSTS = ("forward", "backward_input", "backward_weight")


def simulate_command(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status. Raises :class:`ConfigError` for a user's mistake."""
    options = _parser().parse_args(list(argv))
    _check_options(options)
    given = {name: _times(name, getattr(options, name)) for name in COSTS}
    outputs = {name: Path(path) for name in CONTENTS if (path := getattr(options, name)) is not None}
    _check_outputs(outputs, options.table)
    results = _run(options, given)
    _write(outputs, results.simulations)
    if options.json:
        print(json.dumps(results.as_dict(options.compare)))
        return 0
    print(results.as_text(options.compare, Terminal.of_stdout()))
    for path in outputs.values():
        print(f"wrote {path}")
    return 0


@dataclass
class _Results:
    """Simulations by name, the fastest first; why others cannot run; what ``auto`` knows of its table."""

    simulations: dict[str, Simulation]
    refused: dict[str, str]
    auto: AutoResult | None
    memory_limit: float
    overlap: float

    def as_dict(self, compared: bool) -> dict[str, Any]:
        schedules = [figures(*item) for item in self.simulations.items()]
        found: dict[str, Any] = {}
        if self.auto is not None:
            names = ("objective", "value", "lower_bound", "gap", "proved_optimal", "found_by", "peak_memory")
            found = {"auto": {name: getattr(self.auto, name) for name in names} | {"memory_limit": self.memory_limit}}
            for each in schedules if compared else ():
                each["not_compared_with_auto"] = verdict(self.simulations[each["schedule"]], self.memory_limit)
        return {"schedules": schedules, "refused": self.refused, **found} if compared else schedules[0] | found

    def as_text(self, compared: bool, terminal: Terminal) -> str:
        if compared:
            limit = None if self.auto is None else self.memory_limit
            text = compare(self.simulations, self.refused, terminal, limit)
        else:
            text = describe(*next(iter(self.simulations.items())), terminal)
        if self.auto is None:
            return text
        return f"{text}\n\n{searched(self.memory_limit, self.auto.peak_memory, self.overlap)}\n{self.auto}"


def _run(options: argparse.Namespace, given: dict[str, list[float]]) -> _Results:
    """Make and time all tables that are asked for. Raises :class:`ConfigError`."""
    own = {} if options.table is None else _read_table(options)
    simulations: dict[str, Simulation] = {}
    refused: dict[str, str] = {}
    auto = None
    for name in [*own, *_names(options)]:
        _show_progress(f"timing {name} ...")
        try:
            if name == AUTO:
                auto = _search(options, given)
                table = auto.table
            else:
                table = own[name] if name in own else _make_table(name, options)
            simulations[name] = _simulate(table, given, options)
        except ValueError as error:
            if not options.compare:
                raise ConfigError(one_line(str(error))) from error
            refused[name] = one_line(str(error))
        finally:
            _show_progress("")
    if not simulations:
        raise ConfigError(f"compare: no schedule can run this; {next(iter(refused.values()))}")
    ordered = dict(sorted(simulations.items(), key=lambda item: item[1].makespan))
    return _Results(ordered, refused, auto, _limit(options), options.overlap)


def _limit(options: argparse.Namespace) -> float:
    return options.ranks if options.memory_limit is None else options.memory_limit


def _show_progress(text: str) -> None:
    """Replace the last line on a terminal; nothing where errors go to a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _names(options: argparse.Namespace) -> list[str]:
    if options.compare:
        return [*SCHEDULES, *([AUTO] if options.memory_limit is not None else [])]
    return [] if options.table is not None else [options.schedule]


def _parser() -> CommandParser:
    summaries = {name: schedule.summary for name, schedule in SCHEDULES.items()}
    summaries[AUTO] = "the best table with one copy of the weights that a search finds within --memory_limit"
    names = "\n".join(f"  {name:12} {summary}" for name, summary in summaries.items())
    parser = CommandParser(
        prog="r1mega simulate",
        usage="r1mega simulate (--schedule NAME | --table FILE | --compare) [--ranks N --microbatches N] [...]",
        description=HELP + names,
    )
    add = parser.add_argument
    add("--schedule", type=str, metavar="NAME", help="One of the schedules above.")
    add("--table", type=str, metavar="FILE", help="CSV file with a schedule of your own, as above.")
    add("--compare", action="store_true", help="Every schedule (and --table) in one table, one picture, one trace.")
    add("--ranks", type=int, metavar="N", help="Ranks of the pipeline.")
    add("--microbatches", type=int, metavar="N", help="Microbatches of a step.")
    add("--chunks", type=int, metavar="N", help="Stages a rank holds, for interleaved, looped-bfs and auto.")
    add("--memory_limit", type=float, metavar="N",
        help="For auto (with --compare it is shown, too): most activations of a rank, in microbatches of its share of "
        "the model; the number of ranks by default, as 1f1b needs. A forward adds 1, an input gradient and a weight "
        "gradient give back half each; the peak activations that are printed count until the W.")  # fmt: skip
    add("--forward", type=str, default="1", metavar="TIME", help="Forward; a number or a comma list.")
    add("--backward_input", type=str, default="1", metavar="TIME", help="Backward, input gradients; likewise.")
    add("--backward_weight", type=str, default="1", metavar="TIME", help="Backward, weight gradients; likewise.")
    add("--communication", type=float, default=0.0, metavar="TIME", help="From a rank to another, beside its work.")
    add("--overlap", type=float, default=1.0, metavar="X",
        help="What an overlapped forward and backward (dualpipe) takes of their sum; auto makes none.")  # fmt: skip
    add("--recompute", action="store_true", help="Compute each forward again before its backward; costs a forward.")
    add("--json", action="store_true", help="Print one JSON object instead.")
    add("--png", type=str, metavar="FILE", help="Draw the timeline, with the peak of activations beside it.")
    add("--trace", type=str, metavar="FILE", help="Write a trace for ui.perfetto.dev; a unit is a millisecond.")
    add("--csv", type=str, metavar="FILE", help="Write the schedule's table, which --table reads back.")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    names = ", ".join([*SCHEDULES, AUTO])
    if options.schedule is None and options.table is None and not options.compare:
        raise ConfigError(f"schedule: must be one of {names}; or give --table FILE or --compare")
    if options.schedule is not None:
        try:
            require_known(options.schedule, [*SCHEDULES, AUTO])
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if options.schedule is not None and (options.table is not None or options.compare):
        other = "compare shows every schedule" if options.compare else "table is one already"
        raise ConfigError(f"schedule={options.schedule}: {other}; leave one of the two out")
    if options.memory_limit is not None and options.schedule != AUTO and not options.compare:
        raise ConfigError(f"memory_limit={options.memory_limit:g}: is for --schedule {AUTO} and --compare")
    if options.recompute and AUTO in _names(options):
        raise ConfigError(f"recompute: {AUTO} does not know of it; leave one of the two out")
    if options.csv is not None and options.compare:
        raise ConfigError(f"csv={options.csv}: is for one schedule; give --schedule instead of --compare")
    for name in ("ranks", "microbatches"):
        if getattr(options, name) is None and options.table is None:
            raise ConfigError(f"{name}: must be a number, as in --{name} 8")
    for name in ("ranks", "microbatches", "chunks"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"{name}={number}: must be 1 or more")
    if options.table is None:
        pairs = options.ranks * options.microbatches * (options.chunks or 1)
        if pairs > MOST_PAIRS:
            raise ConfigError(
                f"ranks={options.ranks}, microbatches={options.microbatches}: {pairs:,} microbatches on all stages are "
                f"too many to simulate; at most {MOST_PAIRS:,}"
            )


def _check_outputs(outputs: dict[str, Path], table: str | None) -> None:
    """Find out before any work whether the files can be written."""
    seen = {} if table is None else {Path(table).resolve(): "table"}
    for name, path in outputs.items():
        folder = path.parent
        if not folder.is_dir():
            raise ConfigError(f"{name}={path}: there is no folder {folder}")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{name}={path}: is no file; must be the path of one to write")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{name}={path}: must be in a folder that can be written to")
        if path.resolve() in seen:
            raise ConfigError(f"{name}={path}: is the file of {seen[path.resolve()]}, too; must be another one")
        seen[path.resolve()] = name


def _times(name: str, text: str) -> list[float]:
    """The numbers of a comma list. Raises :class:`ConfigError`."""
    try:
        times = [float(part) for part in text.split(",")]
        Costs(times, 0.0, 0.0)
    except ValueError:
        fits = "must be a time of 0 or more, or a comma list with one for each stage, such as 1,1,1,1.6"
        raise ConfigError(f"{name}={text}: {fits}") from None
    return times


def _read_table(options: argparse.Namespace) -> dict[str, Table]:
    """The table of ``--table`` by the file's name, proved to be able to run. Raises :class:`ConfigError`."""
    where = f"table={options.table}"
    try:
        table = read_table(options.table)
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror or error}; must be a CSV file") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {one_line(str(error))}") from error
    for name, number in (("ranks", table.num_ranks), ("microbatches", table.num_microbatches)):
        if getattr(options, name) not in (None, number):
            raise ConfigError(f"{name}={getattr(options, name)}: {options.table} has {number}")
        setattr(options, name, number)
    name = Path(options.table).name
    return {f"{name} (table)" if name in (*SCHEDULES, AUTO) else name: table}


def _make_table(name: str, options: argparse.Namespace) -> Table:
    """The table called ``name``. In a comparison ``--chunks`` is for those that take it. Raises ValueError."""
    takes_chunks = not options.compare or SCHEDULES[name].chunks is None
    return make_table(name, options.ranks, options.microbatches, options.chunks if takes_chunks else None)


def _search(options: argparse.Namespace, given: dict[str, list[float]]) -> AutoResult:
    """What ``auto`` finds. Costs by stage tell how many stages a rank may hold. Raises ValueError."""
    from r1mega.pipeline.auto import best_table

    count = max(map(len, given.values()))
    of_costs = count // options.ranks if count % options.ranks == 0 else 1
    chunks = [options.chunks] if options.chunks else list(dict.fromkeys((of_costs, 1, 2)))
    costs = costs_of(given, options.ranks, options.ranks * chunks[0], options.communication, options.overlap)
    return best_table(options.ranks, options.microbatches, costs, _limit(options), chunks)


def _simulate(table: Table, given: dict[str, list[float]], options: argparse.Namespace) -> Simulation:
    if options.recompute:
        table = with_recomputation(table)
    costs = costs_of(given, table.num_ranks, table.stages_per_copy, options.communication, options.overlap)
    simulation = simulate(table, costs)
    if not math.isfinite(simulation.makespan):
        raise ValueError("forward, backward_input, backward_weight and communication are too large to be added up")
    return simulation


def costs_of(
    given: dict[str, list[float]], num_ranks: int, num_stages: int, communication: float = 0.0, overlap: float = 1.0
) -> Costs:
    """Costs of the stages of a copy, from what the user says.

    Args:
        given: for each of forward, backward_input and backward_weight one number, the time of a rank's whole share of
            the model, or a number for each stage.

    Raises:
        ValueError: the numbers of stages do not fit, or all times are 0.
    """
    if not any(map(any, given.values())):
        raise ValueError("forward, backward_input and backward_weight are all 0; there is nothing to time")
    count = next((len(times) for times in given.values() if len(times) > 1), num_stages)
    by_stage = {
        name: times if len(times) > 1 else [times[0] * num_ranks / count] * count for name, times in given.items()
    }
    return Costs(**by_stage, communication=communication, overlap=overlap).recut(num_stages)


def _write(outputs: dict[str, Path], simulations: dict[str, Simulation]) -> None:
    """Make everything, then write it."""
    contents = {name: CONTENTS[name](simulations) for name in outputs}
    for name, path in outputs.items():
        content = contents[name]
        try:
            if isinstance(content, str):
                write_whole(path, content)
            else:
                _write_bytes(path, content)
        except OSError as error:
            raise ConfigError(f"{name}={path}: {error.strerror or error}") from error


def _picture(simulations: dict[str, Simulation]) -> bytes:
    from r1mega.pipeline.timeline.picture import picture

    return picture(simulations)


def _trace(simulations: dict[str, Simulation]) -> str:
    from r1mega.pipeline.timeline.trace import trace

    return trace(simulations)


def _csv(simulations: dict[str, Simulation]) -> str:
    return next(iter(simulations.values())).table.to_csv()


CONTENTS: dict[str, Callable[[dict[str, Simulation]], str | bytes]] = {"png": _picture, "trace": _trace, "csv": _csv}


def _write_bytes(path: Path, content: bytes) -> None:
    """As :func:`write_whole`, which writes text."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
