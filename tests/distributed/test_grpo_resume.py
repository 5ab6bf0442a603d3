"""A GRPO run that is killed, wherever it is, and goes on is the run that was never stopped."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1mega.config import Config
from r1mega.settings import dump_config
from tests.distributed.grpo_run import Result, in_folder, make_config, result, run, write_data
from tests.distributed.test_grpo_run import assert_same

STEPS = 8
# One process imports everything once and forks the two ranks of each run; rank 1 kills itself at the place named.
KILLED = """
import errno, os, signal, sys
from pathlib import Path
import torch.distributed as dist
from tests.distributed.grpo_run import run
from r1mega.rl import grpo
from r1mega.rl.rollout.native import NativeEngine
from r1mega.settings import parse_config
from r1mega.train.learner import Learner

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying_engine(calls):
    # in call number `calls`, once the first completion is there and others are under way
    generate, seen = NativeEngine.generate, []
    def dying(self, requests, sampling, on_finished=None):
        seen.append(1)
        if len(seen) < calls:
            return generate(self, requests, sampling, on_finished)
        return generate(self, requests, sampling, lambda completion: die())
    NativeEngine.generate = dying

def dying_update(step):
    update = Learner.update
    def dying(self, number, batches):
        return die() if number == step else update(self, number, batches)
    Learner.update = dying

def full_disk(step):
    write = grpo.write_completions
    def full(folder, number, replica, lines):
        if number == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "completions")
        write(folder, number, replica, lines)
    grpo.write_completions = full

def rank_of(rank, path, place, number):
    # a port that is free now may be taken by then
    dist.init_process_group("gloo", store=dist.FileStore(path + ".store", 2), rank=rank, world_size=2)
    sys.stderr = os.fdopen(os.open(path + f".{rank}.err", os.O_WRONLY | os.O_CREAT, 0o644), "w", buffering=1)
    if rank == 1:
        {"engine": dying_engine, "update": dying_update, "disk": full_disk}[place](number)
    os._exit(run(rank, 2, parse_config(["--config", path])).status)

for job in sys.argv[1:]:
    path, place, number = job.split(",")
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            rank_of(rank, path, place, int(number))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    Path(path + ".statuses").write_text(repr(statuses))
"""
# generate is called twice in an evaluation, once in a rollout
PLACES = {
    "the_evaluation_before_step_1": ("engine", 2),
    "the_third_rollout": ("engine", 2 + 1 + 1 + 2 + 1),  # an evaluation has come after the second
    "the_second_update_of_the_third_rollout": ("update", 6),
}
FULL_DISK = "a_full_disk"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    config = make_config(write_data(tmp_path_factory.mktemp("grpo")))
    train = dataclasses.replace(config.train, num_steps=STEPS, checkpoint_interval=2, keep_checkpoints=2)
    return dataclasses.replace(config, train=train)


@pytest.fixture(scope="module")
def uninterrupted(pool, config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert [seen.status for seen in pool.run(run, 2, in_folder(config, folder, parallel=dict(ep=2)))] == [0, 0]
    assert len(result(folder).metrics) == STEPS // 2
    return folder


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory) -> dict[str, Path]:
    """The folder of each run that was killed, by place."""
    folder, jobs, found = tmp_path_factory.mktemp("killed"), [], {}
    for name, (place, number) in (PLACES | {FULL_DISK: ("disk", 3)}).items():
        found[name] = folder / name
        settings = folder / f"{name}.yaml"
        settings.write_text(dump_config(in_folder(config, folder / name, parallel=dict(ep=2))))
        jobs.append(f"{settings},{place},{number}")
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run([sys.executable, "-c", KILLED, *jobs], env=environment, check=True, timeout=300, cwd=root)
    return found


@pytest.mark.parametrize("name", PLACES)
def test_the_survivor_names_the_rank_that_died_in_one_line(killed, name: str) -> None:
    settings = killed[name].with_suffix(".yaml")
    assert Path(f"{settings}.statuses").read_text() == repr([1, -signal.SIGKILL])
    line = r"r1mega: error: rank 0 stops: rank 1 \(process \d+\) died\n"
    assert re.fullmatch(line, Path(f"{settings}.0.err").read_text())


def test_a_full_disk_is_said_in_one_line_by_the_rank_that_has_it(killed) -> None:
    settings = killed[FULL_DISK].with_suffix(".yaml")
    assert Path(f"{settings}.statuses").read_text() == "[1, 1]"
    expected = "r1mega: error: rank 1 stops: No space left on device: completions\n"
    assert Path(f"{settings}.1.err").read_text() == expected
    line = r"r1mega: error: rank 0 stops: rank 1 \(process \d+\) died\n"
    assert re.fullmatch(line, Path(f"{settings}.0.err").read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "completions").iterdir())}


@pytest.mark.parametrize("name", [*PLACES, FULL_DISK])
def test_a_killed_run_goes_on_to_the_same_numbers_bit_for_bit(
    pool, config, killed, uninterrupted, tmp_path, name: str
) -> None:
    folder = copy_of(killed[name], tmp_path / "run")
    (folder / "completions").mkdir(exist_ok=True)
    (folder / "completions" / ".step_00000005.00001.jsonl.gz.tmp").write_bytes(b"half")
    assert (result(folder).metrics if name != "the_evaluation_before_step_1" else []) != result(uninterrupted).metrics
    seen = pool.run(run, 2, in_folder(config, folder, resume=True, parallel=dict(ep=2)))
    assert [each.status for each in seen] == [0, 0]
    found, expected = result(folder), result(uninterrupted)
    assert found.metrics == expected.metrics
    assert (folder / "evaluations.jsonl").read_bytes() == (uninterrupted / "evaluations.jsonl").read_bytes()
    assert files(folder) == files(uninterrupted) and len(files(folder)) == STEPS // 2 * 2
    assert_equal_tensors(found, expected)


def assert_equal_tensors(found: Result, expected: Result) -> None:
    assert found.tensors.keys() == expected.tensors.keys()
    assert any(name.startswith("reference.") for name in found.tensors)
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name


@pytest.mark.parametrize("parallel", [dict(tp=2), dict(pp=2, schedule="dualpipe")], ids=["tp2", "dualpipe"])
def test_a_killed_run_goes_on_under_another_layout_to_rounding(
    pool, config, killed, uninterrupted, tmp_path, parallel
) -> None:
    folder = copy_of(killed["the_third_rollout"], tmp_path / "run")
    pool.run(run, 2, in_folder(config, folder, resume=True, parallel=parallel))
    assert_same(result(folder), result(uninterrupted))


def test_records_of_evaluations_after_the_checkpoint_are_dropped(pool, config, killed, tmp_path) -> None:
    """Those of another interval would stay for ever."""
    folder = copy_of(killed["the_third_rollout"], tmp_path / "run")
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 5, "pass@1": 1.0}\n')
    changed = dataclasses.replace(config, rl=dataclasses.replace(config.rl, eval_interval=0))
    pool.run(run, 1, in_folder(changed, folder, resume=True))
    steps = [line["step"] for line in result(folder).evaluations]
    assert steps in ([0, STEPS], [0, 4, STEPS])  # whether the checkpoint of step 4 was whole yet is left to chance


def copy_of(folder: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(folder), str(to)], check=True)
    return to
