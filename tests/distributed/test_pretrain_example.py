"""The example as a user runs it: bash and torchrun, the summary at the end, and what is said when a rank dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.prepare_data import main as prepare_data

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples/pretrain_r1_moe.sh")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STEPS = 20
MINUTE = 60.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a corpus of a few kilobytes, and for a model and steps that are small enough for it."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"Question: What is {i} + {i * 7}? Answer: {i * 8}. The square of {i} is {i * i}.\n" for i in range(400)]
    (folder / "text.txt").write_text("".join(lines))
    out = folder / "data"
    assert prepare_data(["--input", str(folder / "text.txt"), "--output", str(out), "--vocab_size", "340"]) == 0
    return [
        f'--data.train=["{out / "train"}"]', f'--data.valid=["{out / "valid"}"]',
        f"--data.tokenizer={out / 'tokenizer.model'}", "--data.sequence_length=64", "--model.vocab_size=340",
        "--model.num_layers=2", "--model.hidden_size=64", "--train.valid_batches=1", "--train.sample_tokens=8",
        "--optimizer.learning_rate=0.01", "--optimizer.warmup_steps=2", f"--train.num_steps={STEPS}",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """What a user's shell has: this Python first, one thread a process, nothing of a job."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NPROC", "PYTHONPATH", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}


def run(command: list[str], folder: Path) -> str:
    """What a run that goes well prints; nothing of it on stderr, and no warning."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=folder, timeout=5 * MINUTE, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search("warning|traceback", done.stdout, re.IGNORECASE)
    return done.stdout


def test_bash_trains_on_four_processes_and_ends_with_the_summary(settings: list[str], tmp_path: Path) -> None:
    out = run(["bash", EXAMPLE, *settings, "--train.output_dir=run"], tmp_path)
    assert out.startswith("r1mega: starting 4 processes\n")
    assert f"r1mega: 4 processes (dp=2 tp=1 pp=2 ep=2 etp=1) on cpu, float32, {STEPS} steps to run\n" in out
    steps = re.findall(r"^step +(\d+)/20  loss [\d.]+  grad [\d.]+  [\d.]+k? tokens/s  \d+:\d\d left$", out, re.M)
    assert steps[0] == "1" and steps[-1] == str(STEPS)
    summary = dict(re.findall(r"^  (\S.{17})(.+)$", out.split("\ndone: 20 steps, ")[1], re.M))
    rows = {name.strip(): value for name, value in summary.items()}
    assert re.fullmatch(r"[\d.]+ -> [\d.]+ \(\d+% of the first\)", rows["loss"])
    assert float(rows["validation loss"]) > 0 and re.fullmatch(r"[\d.]+k? tokens/s", rows["speed"])
    assert re.fullmatch(r"the busiest expert of a layer has [\d.]+ x the mean load", rows["expert balance"])
    assert rows["sample"].startswith("Question: What is 12 + 30?|")
    for name in ("checkpoint", "loss curve", "expert load", "metrics"):
        assert (tmp_path / rows[name]).exists(), name
    assert list((tmp_path / rows["TensorBoard"].removeprefix("tensorboard --logdir ")).glob("events.*"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS and losses[-1] < 0.6 * losses[0]


def test_torchrun_alone_is_one_process(settings: list[str], tmp_path: Path) -> None:
    out = run([*TORCHRUN, EXAMPLE, *settings, "--train.output_dir=run", "--train.num_steps=1"], tmp_path)
    assert "r1mega: 1 process (dp=1 tp=1 pp=1 ep=1 etp=1) on cpu, float32, 1 step to run\n" in out
    assert "\ndone: 1 step, 1.02k tokens in " in out


class Job:
    """A run of more steps than it will take; ``with`` ends it whatever happens."""

    def __init__(self, command: list[str], settings: list[str], folder: Path) -> None:
        command = [*command, *settings, f"--train.output_dir={folder / 'run'}", "--train.num_steps=1000"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=folder,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()
        self.process.wait(MINUTE)

    def wait_for(self, text: str) -> None:
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(self.process.stderr.read())

    def rank(self, number: int) -> int:
        """The process of rank ``number``, as soon as all ranks answer signals in their own way."""
        deadline = time.monotonic() + MINUTE
        while time.monotonic() < deadline:
            ready = [pid for pid in self._children() if _catches(pid, signal.SIGTERM)]
            ranks = {rank: pid for pid in ready for rank in range(4) if f"RANK={rank}" in _environment_of(pid)}
            if len(ranks) == 4:
                return ranks[number]
            time.sleep(0.02)
        raise AssertionError("there are no four ranks")

    def _children(self) -> Iterator[int]:
        for tasks in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # the thread may have ended
                yield from map(int, tasks.read_text().split())

    def end(self) -> tuple[int, str]:
        """Exit status and stderr of the job, which must end within a minute."""
        _, errors = self.process.communicate(timeout=MINUTE)
        return self.process.returncode, errors


def _environment_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return []


def _catches(pid: int, number: signal.Signals) -> bool:
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def own_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("r1mega:")]


@pytest.mark.parametrize(("rank", "begun"), [(0, True), (2, False)])
def test_a_rank_that_dies_under_torchrun_ends_the_job_with_a_line_that_names_it_alone(
    settings: list[str], tmp_path: Path, rank: int, begun: bool
) -> None:
    with Job([*TORCHRUN, "--nproc-per-node=4", EXAMPLE], settings, tmp_path) as job:
        if begun:
            job.wait_for("step ")
        pid = job.rank(rank)
        os.kill(pid, signal.SIGKILL)
        status, errors = job.end()
    assert status == 1
    (line,) = own_lines(errors)
    assert re.fullmatch(rf"r1mega: error: rank \d stops: rank {rank} \(process {pid}\) died", line)
    root_cause = errors.split("Root Cause (first observed failure):")[1]
    assert f"rank      : {rank} (local_rank: {rank})" in root_cause and "SIGKILL" in root_cause


def test_a_rank_that_dies_under_bash_is_named_in_the_only_line(settings: list[str], tmp_path: Path) -> None:
    with Job(["bash", EXAMPLE], settings, tmp_path) as job:
        pid = job.rank(3)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        status, errors = job.end()
    assert status == 1
    assert errors == f"r1mega: error: rank 3 (process {pid}) died (SIGKILL), so the others were stopped\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_job_under_bash_that_is_stopped_says_so_in_one_line(
    settings: list[str], tmp_path: Path, number: int, status: int
) -> None:
    with Job(["bash", EXAMPLE], settings, tmp_path) as job:
        job.rank(3)
        time.sleep(2)
        if number == signal.SIGINT:
            os.killpg(job.process.pid, number)  # Ctrl-C reaches every process of the terminal
        else:
            job.process.send_signal(number)
        assert job.end() == (status, "\nr1mega: stopped\n")


def test_a_mistake_under_torchrun_is_one_line_of_ours_and_in_torchruns_report(tmp_path: Path) -> None:
    command = [*TORCHRUN, "--nproc-per-node=2", "-m", "r1mega", "pretrain", "--parallel.tp=3"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=MINUTE, check=False
    )
    line = "r1mega: error: parallel.tp=3: must divide the number of processes, 2"
    assert done.returncode == 1
    assert len(own_lines(done.stderr)) == 1 and own_lines(done.stderr)[0].startswith(line)
    assert line in done.stderr.split("Root Cause (first observed failure):")[1]
