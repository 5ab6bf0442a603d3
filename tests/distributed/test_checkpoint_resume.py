"""A run that is killed and goes on is the run that was never stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from r1mega.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from r1mega.data.megatron import quiet_import
from r1mega.settings import dump_config
from r1mega.train.metrics import CLOCK_FIELDS, read_metrics
from r1mega.train.pretrain import pretrain

STEPS = 12
LENGTH = 16


def write_data(folder: Path, name: str, num_tokens: int) -> str:
    with quiet_import():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    prefix = folder / name
    tokens = torch.randint(0, 64, (num_tokens,), generator=torch.Generator().manual_seed(len(name))).tolist()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Config:
    """A tiny mixture of experts with everything on that a checkpoint must keep."""
    folder = tmp_path_factory.mktemp("data")
    attention = AttentionConfig(num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    moe = MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=8, num_shared_experts=1, aux_loss_coefficient=0.01)
    return Config(
        model=ModelConfig(
            vocab_size=64, hidden_size=16, num_layers=3, first_dense_layers=1, ffn_hidden_size=32, num_mtp_layers=1,
            attention=attention, moe=moe,
        ),
        data=DataConfig(
            train=[write_data(folder, "train", 600)], valid=[write_data(folder, "valid", 300)], sequence_length=LENGTH
        ),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=3),
        train=TrainConfig(
            num_steps=STEPS, global_batch_size=4, dtype="float64",
            valid_interval=5, valid_batches=1, checkpoint_interval=2, keep_checkpoints=2,
        ),
    )  # fmt: skip


def in_folder(job: Config, folder: Path, resume: bool = False, **parallel: int) -> Config:
    train = dataclasses.replace(job.train, output_dir=str(folder), resume=resume)
    return dataclasses.replace(job, train=train, parallel=dataclasses.replace(job.parallel, **parallel))


def run(rank: int, world_size: int, config: Config) -> int:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    try:
        return pretrain(config)
    finally:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]


@pytest.fixture(scope="module")
def uninterrupted(pool, job, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert pool.run(run, 2, in_folder(job, folder, ep=2)) == [0, 0]
    return without_clock(folder)


def without_clock(folder: Path) -> list[dict]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in CLOCK_FIELDS} for line in lines]


KILLED = """
import os, signal, sys
import torch.distributed as dist
from r1mega.settings import parse_config
from r1mega.train.pretrain import pretrain
from r1mega.train.trainer import Trainer
# a port that is free now may be taken by then
store = dist.FileStore(sys.argv[1] + ".store", 2)
dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
step = Trainer.step
def dying_step(self):
    if self.state.rank == 1 and self.progress.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
Trainer.step = dying_step
sys.exit(pretrain(parse_config(["--config", sys.argv[1]])))
"""


def run_until_killed(config: Config, folder: Path, step: int) -> str:
    """Two processes; rank 1 is killed before step ``step + 1``. What rank 0 says on stderr."""
    settings = folder.with_suffix(".yaml")
    settings.write_text(dump_config(config))
    root = str(Path(__file__).parents[2])
    common = os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(settings), str(step)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert ranks[1].returncode == -signal.SIGKILL, errors[1]
    assert ranks[0].returncode == 1, errors[0]
    return errors[0]


@pytest.fixture(scope="module")
def killed(job, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("killed") / "run"
    step = random.randint(3, STEPS - 2)
    return folder, run_until_killed(in_folder(job, folder, ep=2), folder, step)


def copy_of(folder: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(folder), str(to)], check=True)
    return to


def test_the_survivor_names_the_rank_that_died_in_one_line(killed):
    assert re.fullmatch(r"r1mega: error: rank 0 stops: rank 1 \(process \d+\) died\n", killed[1])


def test_a_killed_run_goes_on_to_the_same_metrics_bit_for_bit(pool, job, killed, uninterrupted, tmp_path):
    folder = copy_of(killed[0], tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "los')
    assert pool.run(run, 2, in_folder(job, folder, resume=True, ep=2)) == [0, 0]
    assert without_clock(folder) == uninterrupted
    assert len(uninterrupted) == STEPS and "valid_loss" in uninterrupted[4]


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "pp": 2, "ep": 2}])
def test_a_killed_run_goes_on_under_another_layout_to_rounding(pool, job, killed, uninterrupted, tmp_path, parallel):
    world_size = 4 if parallel else 1
    folder = copy_of(killed[0], tmp_path / "run")
    pool.run(run, world_size, in_folder(job, folder, resume=True, **parallel))
    found = without_clock(folder)
    assert len(found) == STEPS
    for line, expected in zip(found, uninterrupted, strict=True):
        assert line == pytest.approx(expected, rel=1e-9)


def test_a_run_that_has_no_step_to_take_leaves_its_settings_alone(pool, job, tmp_path):
    folder = tmp_path / "run"
    short = dataclasses.replace(job, train=dataclasses.replace(job.train, num_steps=2))
    pool.run(run, 1, in_folder(short, folder))
    before = (folder / "config.yaml").read_text()
    again = in_folder(short, folder, resume=True)
    again.optimizer = dataclasses.replace(again.optimizer, learning_rate=0.5)
    pool.run(run, 1, again)
    assert (folder / "config.yaml").read_text() == before
    longer = dataclasses.replace(again, train=dataclasses.replace(again.train, num_steps=3))
    pool.run(run, 1, longer)
    assert (folder / "config.yaml").read_text() == dump_config(longer)


def test_a_finished_run_leaves_everything_where_the_summary_says(pool, job, tmp_path):
    pool.run(run, 1, in_folder(job, tmp_path / "run"))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    written = {"config.yaml", "data.json", "expert_load.png", "loss.png", "metrics.jsonl"}
    assert names == written | {"checkpoints", "tensorboard"}
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"step", "tokens", "loss", "mtp_loss", "aux_loss", "grad_norm", "learning_rate", *CLOCK_FIELDS}
    assert last.keys() >= wanted | {"expert_load_max_over_mean", "valid_loss"}
    of_layers = [value for name, value in last.items() if name.startswith("expert_load/")]
    assert len(of_layers) > 1 and min(of_layers) >= 1
    assert last["expert_load_max_over_mean"] == pytest.approx(sum(of_layers) / len(of_layers))
    assert last["tokens"] == STEPS * 4 * LENGTH
