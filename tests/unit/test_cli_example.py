"""examples/pretrain_r1_moe.sh and train_r1_zero.sh: bash and Python in one file, and how they choose processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from r1mega.config import Config, ConfigError
from r1mega.data.corpus import FileCorpus
from r1mega.data.prepare import prepare
from r1mega.settings import parse_config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/pretrain_r1_moe.sh"
R1_ZERO = ROOT / "examples/train_r1_zero.sh"


def load(example: Path = EXAMPLE) -> dict:
    """The names of the example's Python part."""
    names = {"__name__": "example", "__file__": str(example)}
    exec(compile(example.read_text(encoding="utf-8"), example, "exec"), names)
    return names


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], list[str]]:
    """``launch(arguments)`` returns the command that the example would become, without running it."""
    example = load()
    monkeypatch.chdir(tmp_path)  # where no run of the reader's lies
    for name in ("RANK", "WORLD_SIZE", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    for step in ("prepare_data", "check_data"):  # the corpus need not be there
        example["launch"].__globals__[step] = lambda config: None

    def run(arguments: list[str]) -> list[str]:
        example["launch"](arguments)
        return commands[-1]

    return run


@pytest.mark.parametrize("example", [EXAMPLE, R1_ZERO])
def test_an_example_is_valid_bash_and_valid_python(recwarn: pytest.WarningsRecorder, example: Path) -> None:
    checked = subprocess.run(["bash", "-n", example], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    compile(example.read_text(encoding="utf-8"), example, "exec")
    assert not recwarn.list
    assert example.read_text(encoding="utf-8").startswith("''':'\n")


@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        ([], 4),
        (["--train.num_steps", "50"], 4),
        (["--parallel.tp", "2"], 4),
        (["--parallel.ep=8"], 8),
        (["--parallel.tp", "2", "--parallel.pp", "2", "--parallel.ep", "4"], 8),
        (["--parallel.tp=2", "--parallel.etp=2", "--parallel.ep=4"], 8),
    ],
)
def test_processes_are_4_or_as_many_as_the_layout_needs(
    launch: Callable[[list[str]], list[str]], arguments: list[str], processes: int
) -> None:
    assert f"--nproc-per-node={processes}" in launch(arguments)


def test_nproc_sets_the_number_of_processes(
    launch: Callable[[list[str]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC", "2")
    command = launch(["--parallel.ep=2"])
    assert "--nproc-per-node=2" in command
    assert command[command.index(str(EXAMPLE)) + 1 :] == ["--parallel.ep=2"]


def test_without_sizes_the_layout_is_two_stages_of_two_expert_ranks(launch: Callable[[list[str]], list[str]]) -> None:
    settings = ["--parallel.schedule", "gpipe"]
    command = launch(settings)
    assert command[command.index(str(EXAMPLE)) + 1 :] == ["--parallel.pp=2", "--parallel.ep=2", *settings]


def test_default_data_is_found_from_any_working_directory_and_another_corpus_needs_no_checksum() -> None:
    settings = load()["settings"]
    default, own = parse_config(settings([])), parse_config(settings(['--data.train=["mine"]']))
    assert default.data.train == [str(ROOT / "data/default/train")]
    assert default.data.checksum is not None
    assert (own.data.train, own.data.checksum) == (["mine"], None)


def test_default_data_is_prepared_once_and_a_failure_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load()
    data = example["DATA"] = tmp_path / "data/default"
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    config = parse_config(example["settings"]([]))
    with pytest.raises(ConfigError, match="could not be prepared"):
        example["prepare_data"](config)
    assert commands[0][-3:] == ["--default", "--output", str(data)]
    (tmp_path / "text.txt").write_text("a few words of text\n" * 200)
    prepare(FileCorpus([str(tmp_path / "text.txt")]), data, vocab_size=300, report=lambda line: None)
    example["prepare_data"](config)
    assert len(commands) == 1
    os.truncate(data / "train.bin", 100)
    with pytest.raises(ConfigError, match="could not be prepared"):
        example["prepare_data"](config)
    assert len(commands) == 2


def test_another_corpus_is_not_prepared(tmp_path: Path) -> None:
    example = load()
    example["DATA"] = tmp_path / "data/default"
    example["prepare_data"](Config())
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("program", ["bash", sys.executable])
def test_a_mistake_is_one_line_before_any_process_is_started(tmp_path: Path, program: str) -> None:
    if program == "bash" and not (ROOT / ".venv/bin/python").exists() and not shutil.which("python3"):
        pytest.skip("no python3 for the bash part")
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "NPROC")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(
        [program, EXAMPLE, "--parallel.ep", "3"], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("r1mega: error: parallel.ep=3: must divide the number of experts (16)")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "processes", "passed_on"),
    [
        ([], 2, ["--parallel.ep=2"]),
        (["--train.num_steps", "50"], 2, ["--parallel.ep=2", "--train.num_steps", "50"]),
        (["--parallel.pp=2", "--parallel.ep=2"], 4, ["--parallel.pp=2", "--parallel.ep=2"]),
    ],
)
def test_r1_zero_runs_on_2_processes_or_as_many_as_the_layout_needs(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], processes: int, passed_on: list[str]
) -> None:
    example = load(R1_ZERO)
    for name in ("RANK", "WORLD_SIZE", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    example["launch"].__globals__["prepare"] = lambda: None
    example["launch"](arguments)
    assert f"--nproc-per-node={processes}" in commands[0]
    assert commands[0][commands[0].index(str(R1_ZERO)) + 1 :] == passed_on


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--parallel.ep=3"], "parallel.ep=3: must divide the number of experts (4)"),
        (["--parallel.tp=8"], "parallel.tp=8: must divide model.attention.num_heads (4)"),
        (["--rl.group_size=1"], "rl.group_size=1: must be 2 or more"),
        (["--model.checkpoint=nowhere"], "model.checkpoint=nowhere"),
    ],
)
def test_a_mistake_in_r1_zero_s_settings_is_found_by_the_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    example = load(R1_ZERO)
    for name in ("RANK", "WORLD_SIZE", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", [str(R1_ZERO), *arguments])
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("a process was started"))
    example["launch"].__globals__["prepare"] = lambda: pytest.fail("data were made")
    assert example["run"]() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"r1mega: error: {line}")
    assert error.count("\n") == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_pretrain_says_how_make_takes_settings_after_a_mistake() -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "NPROC")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = ["make", "--old-file=setup", "pretrain", "ARGS=--tp=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    first, second, *_ = done.stderr.splitlines()
    assert first == "r1mega: error: unknown setting tp; did you mean parallel.tp?"
    assert second == 'make pretrain takes settings in ARGS, as in make pretrain ARGS="--train.resume true"'
