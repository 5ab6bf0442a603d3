''':'
# Pre-train a small DeepSeek-V3-shaped mixture of experts. This file is valid bash and valid Python:
#
#     bash examples/pretrain_r1_moe.sh                          4 processes, pp=2 ep=2
#     torchrun --nproc-per-node 4 examples/pretrain_r1_moe.sh   4 processes, dp=4
#     torchrun examples/pretrain_r1_moe.sh                      1 process
#
# Settings follow: --parallel.tp 2 --train.num_steps 50 --train.output_dir DIR. Under bash, NPROC in the environment
# sets the number of processes; without it there are 4, or as many as the --parallel.* sizes need. torchrun started by
# hand prints a notice of its own about OMP_NUM_THREADS unless that is set.
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
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data/default"
sys.path.insert(0, str(ROOT))

from r1mega.stopping import watch

watch()  # before the imports, which take a while

from r1mega.cli import main, report
from r1mega.config import Config, ConfigError
from r1mega.data.check import check_data
from r1mega.data.record import find_damage
from r1mega.launch import become_torchrun, number_of_processes, with_usual_layout
from r1mega.model.huggingface import resolve_model_config
from r1mega.settings import parse_config
from r1mega.train.schedule import check_pipeline

USUAL_PROCESSES = 4


def settings(arguments: list[str]) -> list[str]:
    """``arguments`` after the tiny model's YAML, with its data by absolute path, so that any working directory does."""
    train, valid, tokenizer = DATA / "train", DATA / "valid", DATA / "tokenizer.model"
    data = [f'--data.train=["{train}"]', f'--data.valid=["{valid}"]', f"--data.tokenizer={tokenizer}"]
    if any(argument.startswith("--data.train") for argument in arguments):
        data.append("--data.checksum=null")  # the YAML's is that of the default corpus
    return [f"--config={ROOT / 'examples/configs/r1_tiny.yaml'}", *data, *arguments]


def prepare_data(config: Config) -> None:
    """Make the default corpus and tokenizer if ``config`` uses them and they are not there, whole.

    One process does it, the others wait.
    """
    if config.data.train != [str(DATA / "train")]:
        return
    DATA.parent.mkdir(parents=True, exist_ok=True)
    with (DATA.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if find_damage(DATA) is not None:
            command = [sys.executable, str(ROOT / "tools/prepare_data.py"), "--default", "--output", str(DATA)]
            if subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode != 0:
                raise ConfigError(f"data.train={DATA / 'train'}: could not be prepared; see above")


def launch(arguments: list[str]) -> NoReturn:
    """Check the settings, then become torchrun, which runs this file once a process."""
    arguments = with_usual_layout(arguments, ["--parallel.pp=2", "--parallel.ep=2"])
    config = parse_config(settings(arguments))
    config = dataclasses.replace(config, model=resolve_model_config(config.model))
    processes = number_of_processes(config.parallel, USUAL_PROCESSES)
    config.validate(processes)
    check_pipeline(config, processes)
    prepare_data(config)
    check_data(config)
    if Path(config.train.output_dir).exists():
        from r1mega.train.run_folder import check_folder  # imports torch, so only where there may be something to find

        check_folder(config)
    become_torchrun(__file__, arguments, processes)


def run() -> int:
    """The launcher where torchrun has not started this process, else one rank of the job."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        return main(["pretrain", "--help"])
    try:
        if "RANK" not in os.environ:
            launch(arguments)
        config = parse_config(settings(arguments))
        config.validate(int(os.environ["WORLD_SIZE"]))
        prepare_data(config)
    except ConfigError as error:
        report(error)
        return 2
    return main(["pretrain", *settings(arguments)])


if __name__ == "__main__":
    sys.exit(run())
# end of the Python part
