"""The command line: ``r1mega pretrain | sft | grpo | layout | model | export | simulate | kernels``.

A command is a function ``(arguments) -> exit status`` in :data:`COMMANDS`. Settings are parsed and checked before torch
is imported, so that a mistake costs half a second. A mistake is one line on stderr, from rank 0, and exit status 2.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from r1mega.config import ConfigError
from r1mega.parallel_state import DENSE_AXES, EXPERT_AXES, GROUP_NAMES, Layout
from r1mega.settings import (
    CommandParser,
    SettingsParser,
    group_names,
    is_first_rank,
    one_line,
    parse,
    world_size_from_environment,
)
from r1mega.stopping import LAUNCHED, accept_interrupts, say, watch

AXES = tuple(dict.fromkeys(DENSE_AXES + EXPERT_AXES))
SECONDS_FOR_FIRST_RANK = 10.0
PRESETS = Path(__file__).parent / "rl/presets"
STATUS_STOPPED = 130  # as a shell reports a process that Ctrl-C ended
OTHER_THAN_RL = [name for name in group_names() if not name.startswith("rl")]
NO_BREAK = "\N{NO-BREAK SPACE}"
MOST_RANKS_SHOWN = 8  # a longer group is abbreviated for people; --json is whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for a user's mistake, or the command's own."""
    argv = list(sys.argv[1:] if argv is None else argv)
    watch()
    accept_interrupts()
    try:
        try:
            return run(argv)
        except ConfigError as error:
            report(error)
            return 2
    except BrokenPipeError:
        # The reader (head, less) has gone; what Python flushes at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun hands on what the terminal has sent already
        if is_first_rank() and LAUNCHED not in os.environ:
            print("\nr1mega: stopped", file=sys.stderr, flush=True)
        # Threads that wait for other ranks, which stop as well, would keep an ordinary exit waiting.
        os._exit(STATUS_STOPPED)


def report(error: ConfigError) -> None:
    """Print the line that explains ``error``, once for all ranks.

    All ranks find the same mistake, and rank 0 says it. The others wait: torchrun ends the whole job when its first
    process has gone, which must not be before rank 0 has spoken. A rank that is still alive after that is the only one
    with the mistake (a file that is missing on its machine), so it speaks for itself.
    """
    rank = ""
    if not is_first_rank():
        time.sleep(SECONDS_FOR_FIRST_RANK)
        rank = f" (rank {os.environ['RANK']})"
    say(f"{one_line(str(error))}{rank}")


def run(argv: list[str]) -> int:
    """Find the command in ``argv[0]`` and call it. Raises :class:`ConfigError`."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        if is_first_rank():
            print(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from r1mega import __version__

        print(f"r1mega {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(f"unknown command {argv[0]}; must be one of {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])


OVERVIEW = """\
usage: r1mega COMMAND ...

Training of R1-scale mixture-of-experts models on PyTorch.

commands:
{commands}

r1mega COMMAND --help explains a command and all its settings; r1mega --version prints the version."""


def overview() -> str:
    """The text of ``r1mega --help``."""
    return OVERVIEW.format(commands="\n".join(f"  {name:10}{command.__doc__}" for name, command in COMMANDS.items()))


PRETRAIN_HELP = """\
Pre-train a model. Settings come from YAML files and from flags; what comes later wins. Started by torchrun, the
processes share the work as parallel.* says; started alone, it is one process.

What goes wrong is one line that begins with "r1mega: error:". After it, torchrun prints a report of its own, which
nothing that it runs can prevent where the exit status shall not be 0; bash examples/pretrain_r1_moe.sh prints none.
The notice about OMP_NUM_THREADS is torchrun's, too; it is not printed where that is set.

examples:
  r1mega pretrain --config examples/configs/r1_tiny.yaml --train.num_steps 50
  torchrun --nproc-per-node 4 -m r1mega pretrain --config examples/configs/r1_tiny.yaml --parallel.pp 2 --parallel.ep 2
"""


def pretrain_command(argv: list[str]) -> int:
    """pre-train a model under any layout (start it with torchrun)"""
    parser = SettingsParser(
        prog="r1mega pretrain",
        usage="r1mega pretrain [--config FILE] [--SETTING VALUE ...]",
        description=PRETRAIN_HELP,
        shown=OTHER_THAN_RL,
    )
    config, _ = parse(parser, argv)
    config.validate(world_size_from_environment())
    from r1mega.train.pretrain import pretrain

    return pretrain(config)


SFT_HELP = """\
Fine-tune a model on demonstrations: .jsonl files whose lines are {"prompt": "...", "completion": "..."}, under
data.train. The loss is on the completions. Everything else is as in r1mega pretrain: the layouts, the checkpoints, the
settings. The model starts from model.checkpoint, or from random weights.

examples:
  python tools/make_addition.py --output data/addition
  r1mega sft --config examples/configs/addition_sft.yaml
  torchrun --nproc-per-node 2 -m r1mega sft --config examples/configs/addition_sft.yaml --parallel.ep 2
"""


def sft_command(argv: list[str]) -> int:
    """fine-tune a model on demonstrations (start it with torchrun)"""
    parser = SettingsParser(
        prog="r1mega sft",
        usage="r1mega sft [--config FILE] [--SETTING VALUE ...]",
        description=SFT_HELP,
        shown=OTHER_THAN_RL,
    )
    parser.set_defaults({"train.output_dir": "runs/sft"})
    config, _ = parse(parser, argv)
    config.validate(world_size_from_environment())
    from r1mega.data.demonstrations import check_entries

    check_entries(config.data)
    from r1mega.train.pretrain import pretrain

    return pretrain(config)


GRPO_HELP = """\
Train a model with GRPO and rule-based rewards: DeepSeek-R1-Zero's step, on your model and prompts. Settings come from
YAML files and from flags; what comes later wins. Started by torchrun, the processes share the work as parallel.* says.

--preset r1_zero starts from DeepSeek's own figures: 512 completions a step, 16 steps a rollout, KL 0.001, ...

examples:
  bash examples/train_r1_zero.sh     # everything in small: data, a short SFT, GRPO, evaluation; minutes on two cores
  r1mega grpo --model.checkpoint runs/sft/exported --rl.prompts prompts.jsonl --train.num_steps 50
  torchrun --nproc-per-node 8 -m r1mega grpo --preset r1_zero --model.checkpoint DIR --rl.prompts maths.jsonl
"""


def grpo_command(argv: list[str]) -> int:
    """train with GRPO and rule-based rewards (start it with torchrun)"""
    usage = "r1mega grpo [--preset NAME] [--config FILE] [--SETTING VALUE ...]"
    parser = SettingsParser(prog="r1mega grpo", usage=usage, description=GRPO_HELP, shown=list(group_names()))
    parser.add_argument("--preset", choices=presets(), help="Settings to start from.")
    config, _ = parse(parser, with_preset(argv))
    from r1mega.rl.grpo import grpo

    return grpo(config)


def presets() -> list[str]:
    """The names that ``--preset`` takes."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def with_preset(argv: list[str]) -> list[str]:
    """``--preset NAME`` is ``--config`` with r1mega's own file of that name. Raises :class:`ConfigError`."""
    found = [argument.replace("--preset=", "") for argument in argv if argument.startswith("--preset=")]
    argv = [argument for argument in argv if not argument.startswith("--preset=")]
    if "--preset" in argv:
        at = argv.index("--preset")
        found += argv[at + 1 : at + 2] or [""]
        argv = argv[:at] + argv[at + 2 :]
    for name in found:
        if name not in presets():
            raise ConfigError(f"preset={name}: must be {', '.join(presets())}")
    return [f"--config={PRESETS / name}.yaml" for name in found] + argv


LAYOUT_HELP = """\
Print which rank works with which: the coordinate of each rank in every kind of group, then the groups. Needs no
processes, and shows the groups that pretrain would make with the same parallel settings.

examples:
  r1mega layout --world_size 16 --parallel.tp 2 --parallel.ep 4
  r1mega layout --world_size 2048 --config examples/configs/r1_671b.yaml --json
"""


def layout_command(argv: list[str]) -> int:
    """print which ranks form which groups"""
    parser = SettingsParser(
        prog="r1mega layout",
        usage="r1mega layout --world_size N [--config FILE] [--parallel.SETTING VALUE ...] [--json]",
        description=LAYOUT_HELP,
        shown=["parallel"],
    )
    parser.add_argument("--world_size", type=int, metavar="N", help="Number of processes.", required=True)
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of tables.")
    config, options = parse(parser, argv)
    layout = Layout.from_config(config.parallel, options.world_size)
    print(json.dumps(layout_as_dict(layout)) if options.json else layout_as_text(layout))
    return 0


def layout_as_dict(layout: Layout) -> dict:
    """Sizes, coordinates by rank and groups by name, for ``--json``."""
    return {
        "world_size": layout.world_size,
        "sizes": {axis: layout.size(axis) for axis in AXES},
        "ranks": [{"rank": rank, **layout.coordinates(rank)} for rank in range(layout.world_size)],
        "groups": {name: layout.groups(name) for name in GROUP_NAMES},
    }


def layout_as_text(layout: Layout) -> str:
    """The same as tables: one row a rank, then one paragraph a kind of group."""
    dense, experts = (" x ".join(f"{axis}={layout.size(axis)}" for axis in axes) for axes in (DENSE_AXES, EXPERT_AXES))
    lines = [f"{layout.world_size} ranks = {dense} (dense layers) = {experts} (experts)", ""]
    lines.append("  rank" + "".join(f"{axis:>6}" for axis in AXES))
    for rank in range(layout.world_size):
        coordinates = layout.coordinates(rank)
        lines.append(f"{rank:6}" + "".join(f"{coordinates[axis]:6}" for axis in AXES))
    lines.append("")
    lines += [group_as_text(name, layout.groups(name)) for name in GROUP_NAMES]
    return "\n".join(lines)


def group_as_text(name: str, groups: list[list[int]]) -> str:
    """``tp          2 groups of 2: [0 1] [2 3]``, wrapped."""
    count = f"{len(groups)} group{'s' * (len(groups) > 1)} of {len(groups[0])}"
    title = f"{name:10}{count}:"
    if len(groups[0]) == 1:
        return f"{title} each rank alone" if len(groups) > 1 else f"{title} [0]"
    shown = [ranks if len(ranks) <= MOST_RANKS_SHOWN else [*ranks[:3], "...", ranks[-1]] for ranks in groups]
    # Lines break between groups only; textwrap takes a space that does not break for a letter.
    text = " ".join(f"[{NO_BREAK.join(map(str, ranks))}]" for ranks in shown)
    wrapped = textwrap.fill(f"{title} {text}", width=116, subsequent_indent=" " * 12)
    return wrapped.replace(NO_BREAK, " ")


MODEL_HELP = """\
Print the parameters of a model: how many, and how many a token uses. Nothing is allocated, so the largest
model fits on a laptop.

examples:
  r1mega model --config examples/configs/r1_671b.yaml
  r1mega model --config examples/configs/r1_tiny.yaml --model.num_layers 8
  r1mega model --model.checkpoint Qwen3-30B-A3B
"""


def model_command(argv: list[str]) -> int:
    """print the parameter table of a model"""
    parser = SettingsParser(
        prog="r1mega model",
        usage="r1mega model [--config FILE] [--model.SETTING VALUE ...]",
        description=MODEL_HELP,
        shown=["model"],
    )
    config, _ = parse(parser, argv)
    from r1mega.model.huggingface import resolve_model_config
    from r1mega.model.summary import parameter_table

    print(parameter_table(resolve_model_config(config.model)))
    return 0


EXPORT_HELP = """\
Write a trained model as a Hugging Face checkpoint (safetensors, config.json and the tokenizer), which transformers
loads as it is.

examples:
  r1mega export runs/pretrain exported
  r1mega export runs/maths-10k /models/maths-10k
"""


def export_command(argv: list[str]) -> int:
    """write a run's newest checkpoint in Hugging Face's format"""
    parser = CommandParser(prog="r1mega export", usage="r1mega export RUN OUT", description=EXPORT_HELP)
    parser.add_argument("run", metavar="RUN", help="Folder of the run (its train.output_dir).")
    parser.add_argument("out", metavar="OUT", help="Folder to write; made if it is not there.")
    options = parser.parse_args(argv)
    if not os.path.isdir(options.run):
        raise ConfigError(f"RUN={options.run}: must be the folder of a run (its train.output_dir)")
    from r1mega.model.export import export

    export(options.run, options.out)
    return 0


def simulate_command(argv: list[str]) -> int:
    """time pipeline schedules and draw them"""
    from r1mega.simulate_command import simulate_command

    return simulate_command(argv)


KERNELS_HELP = """\
List the operations of r1mega.kernels: what each does, its implementations, which one runs on this machine, and why.

examples:
  r1mega kernels          # a table
  r1mega kernels --json   # for programs
"""


def kernels_command(argv: list[str]) -> int:
    """list operations and the implementations that run here"""
    parser = CommandParser(prog="r1mega kernels", usage="r1mega kernels [--json]", description=KERNELS_HELP)
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    options = parser.parse_args(argv)
    from r1mega.kernels.overview import as_dict, as_text

    print(json.dumps(as_dict()) if options.json else as_text())
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain_command,
    "sft": sft_command,
    "grpo": grpo_command,
    "layout": layout_command,
    "model": model_command,
    "export": export_command,
    "simulate": simulate_command,
    "kernels": kernels_command,
}

if __name__ == "__main__":
    sys.exit(main())
