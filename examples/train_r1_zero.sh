''':'
# DeepSeek-R1-Zero in small, minutes on two CPU cores: a short supervised training gives a base model that adds two
# numbers right in one sample of five, then GRPO with rewards for the right answer and the format sharpens it. This file
# is valid bash and valid Python:
#
#     bash examples/train_r1_zero.sh                          2 processes, ep=2
#     torchrun --nproc-per-node 2 examples/train_r1_zero.sh   2 processes, dp=2
#     torchrun examples/train_r1_zero.sh                      1 process
#
# Settings of the GRPO run follow: --parallel.pp 2 --train.num_steps 50 --rl.loss.clip_high 0.28 --train.output_dir DIR.
# Under bash, NPROC in the environment sets the number of processes. The base model stays in DIR/base and is used again.
set -euo pipefail
file="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
python="$(dirname "$(dirname "$file")")/.venv/bin/python"
if [ ! -x "$python" ]; then python=python3; fi
if ! "$python" -c "import jsonargparse, yaml" 2> /dev/null; then
    echo "r1mega: error: $python does not have what r1mega needs; run make setup" >&2
    exit 2
fi
exec "$python" -u "$file" "$@"

: << '# end of the Python part'
'''
import dataclasses
import fcntl
import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data/addition"
CONFIGS = ROOT / "examples/configs"
sys.path.insert(0, str(ROOT))

from r1mega.stopping import watch

watch()  # before the imports, which take a while

from r1mega.cli import main, report
from r1mega.config import Config, ConfigError
from r1mega.launch import become_torchrun, number_of_processes, with_usual_layout
from r1mega.model.huggingface import resolve_model_config
from r1mega.rl.tasks.addition import write_addition
from r1mega.settings import is_first_rank, parse_config, world_size_from_environment

USUAL_PROCESSES = 2
FILES = {"rl.prompts": DATA / "prompts.jsonl", "rl.eval_prompts": DATA / "evaluation.jsonl", "data.tokenizer": DATA}


def settings(arguments: list[str]) -> list[str]:
    """``arguments`` after the example's YAML, with its files by absolute path, so that any working directory does."""
    files = [f"--{name}={path}" for name, path in FILES.items()]
    return [f"--config={CONFIGS / 'addition_grpo.yaml'}", *files, *arguments]


def sft_settings(config: Config) -> list[str]:
    """Those of the base model's training: the GRPO run's layout and seed, the rest from its own YAML."""
    sizes = [f"--parallel.{name}={getattr(config.parallel, name)}" for name in ("tp", "pp", "cp", "ep", "etp")]
    data = [f'--data.train=["{DATA / "demonstrations.jsonl"}"]', f"--data.tokenizer={DATA}"]
    folder = Path(config.train.output_dir) / "sft"
    run = [f"--train.output_dir={folder}", f"--train.seed={config.train.seed}", "--train.resume=true"]
    return [f"--config={CONFIGS / 'addition_sft.yaml'}", *data, *sizes, *run]


def check(config: Config, processes: int) -> None:
    """Whether the layout fits, before anything starts. Raises ConfigError."""
    if config.model.checkpoint is None:
        base = parse_config(sft_settings(config))
        base.validate(processes)
        config = dataclasses.replace(config, model=base.model)
    else:
        config = dataclasses.replace(config, model=resolve_model_config(config.model))
    config.validate(processes)


def prepare() -> None:
    """Make the data. One process does it, the others wait."""
    DATA.parent.mkdir(parents=True, exist_ok=True)
    with (DATA.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_addition(DATA)


def launch(arguments: list[str]) -> NoReturn:
    """Check the settings, then become torchrun, which runs this file once a process."""
    arguments = with_usual_layout(arguments, ["--parallel.ep=2"])
    config = parse_config(settings(arguments))
    processes = number_of_processes(config.parallel, USUAL_PROCESSES)
    check(config, processes)
    prepare()
    become_torchrun(__file__, arguments, processes)


def train(arguments: list[str]) -> int:
    """One rank: the base model, if it is not there yet, then GRPO."""
    config = parse_config(settings(arguments))
    check(config, world_size_from_environment())
    prepare()
    folder = Path(config.train.output_dir)
    base = Path(config.model.checkpoint or folder / "base")
    grpo = [*settings(arguments), f"--model.checkpoint={base}", f"--train.output_dir={folder / 'grpo'}"]

    import torch.distributed as dist

    from r1mega.train.process_group import start_process_group

    start_process_group()  # once for both programs
    # every rank has to find the same, before the first of them makes it
    found = [base.is_dir()]
    dist.broadcast_object_list(found)
    if not found[0]:
        if is_first_rank():
            print("train_r1_zero 1/2: the base model, by supervised fine-tuning", flush=True)
        if status := main(["sft", *sft_settings(config)]):
            return status
        if is_first_rank() and (status := main(["export", str(folder / "sft"), str(base)])):
            return status
        dist.barrier()
    if is_first_rank():
        print("train_r1_zero 2/2: GRPO", flush=True)
    status = main(["grpo", *grpo])
    dist.destroy_process_group()
    return status


def run() -> int:
    """The launcher where torchrun has not started this process, else one rank of the job."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        return main(["grpo", "--help"])
    try:
        if "RANK" not in os.environ:
            launch(arguments)
        return train(arguments)
    except ConfigError as error:
        report(error)
        return 2


if __name__ == "__main__":
    sys.exit(run())
# end of the Python part
