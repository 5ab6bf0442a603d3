"""What a user can get wrong: each is one line that names the field and what fits, and nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from r1mega.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from r1mega.data.check import check_data
from r1mega.data.corpus import FileCorpus
from r1mega.data.index import read_index
from r1mega.data.prepare import prepare
from r1mega.model.huggingface_files import read_entries
from r1mega.settings import dump_config, parse_config
from r1mega.train.checkpoint_files import read_progress
from r1mega.train.program import _file_error
from r1mega.train.run_folder import lock_folder, prepare_folder

MOE = ["--model.moe.num_experts=4"]


def one_line(action: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*MOE, "--model.moe.num_shared_experts=-1"], "model.moe.num_shared_experts=-1: must be 0 or more"),
        ([*MOE, "--model.moe.aux_loss_coefficient=-1"], "model.moe.aux_loss_coefficient=-1.0: must be 0 or more"),
        ([*MOE, "--model.moe.routed_scaling_factor=0"], "model.moe.routed_scaling_factor=0.0: must be positive"),
        ([*MOE, "--model.moe.capacity_factor=1e999"], "model.moe.capacity_factor=inf: must be finite"),
        (["--model.attention.q_lora_rank=0"], "model.attention.q_lora_rank=0: must be positive, or null"),
        (["--model.attention.head_dim=-2"], "model.attention.head_dim=-2: must be positive, or null"),
        (
            ["--model.attention.rope.beta_slow=64"],
            "model.attention.rope.beta_fast=32.0: must be more than model.attention.rope.beta_slow (64.0)",
        ),
        (["--model.init_std=0"], "model.init_std=0.0: must be positive"),
        (["--model.mtp_loss_coefficient=-1"], "model.mtp_loss_coefficient=-1.0: must be 0 or more"),
        (["--optimizer.learning_rate=1e999"], "optimizer.learning_rate=inf: must be finite"),
        (
            ["--optimizer.min_learning_rate=5"],
            "optimizer.min_learning_rate=5.0: must be at most optimizer.learning_rate (0.001)",
        ),
        (["--train.seed=-1"], "train.seed=-1: must be between 0 and 2**63 - 1"),
        (["--train.output_dir="], "train.output_dir=: must name a folder"),
        (["--PARALLEL.TP=2"], "unknown setting PARALLEL.TP; did you mean parallel.tp?"),
    ],
)
def test_a_flag_that_cannot_work_is_named_with_what_fits(flags: list[str], message: str) -> None:
    assert one_line(lambda: parse_config(flags)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {num_steps: null}", "train.num_steps=null: must be an integer"),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate=inf: must be finite"),
        ("optimizer: {clip_grad: .nan}", "optimizer.clip_grad=nan: must be finite"),
        ("? [a, b]\n: 3", "config=FILE: is not valid YAML in line 1, column 3: a key must be a name"),
        ("[" * 5000, "config=FILE: is nested too deeply; must be a YAML file of settings"),
    ],
)
def test_a_yaml_file_that_cannot_work_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert one_line(lambda: parse_config(["--config", str(path)])).replace(str(path), "FILE") == message


def write_file(prefix: Path, lengths: list[int], num_tokens: int) -> str:
    """A ``.bin`` file of ``num_tokens`` zeros, and an index whose last offset fits it, whatever the lengths are."""
    numpy.zeros(num_tokens, numpy.uint16).tofile(f"{prefix}.bin")
    offsets = [0] * (len(lengths) - 1) + [2 * (num_tokens - lengths[-1])]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, len(lengths), 1)
    arrays = numpy.array(lengths, numpy.int32).tobytes() + numpy.array(offsets, numpy.int64).tobytes()
    Path(f"{prefix}.idx").write_bytes(header + arrays + bytes(8))
    return str(prefix)


@pytest.mark.parametrize("lengths", [[5, 10], [-5, 25, 10], [2000, 10]])
def test_an_index_whose_lengths_do_not_add_up_is_damaged(tmp_path: Path, lengths: list[int]) -> None:
    prefix = write_file(tmp_path / "data", lengths, 30)
    assert "is damaged: its lengths do not add up" in one_line(lambda: read_index(prefix, "data.train"))


def job(tmp_path: Path, **data: object) -> Config:
    files = DataConfig(train=[write_file(tmp_path / "data", [33], 33)], sequence_length=8)
    return Config(model=ModelConfig(vocab_size=64), data=dataclasses.replace(files, **data))


@pytest.mark.parametrize("field", ["train", "tokenizer", "cache_dir"])
def test_a_path_that_no_file_system_takes_is_one_line(tmp_path: Path, field: str) -> None:
    name = "x" * 300
    config = job(tmp_path, **{field: [name] if field == "train" else name})
    assert one_line(lambda: check_data(config)).startswith(f"data.{field}={name}: ")
    place = dataclasses.replace(config, train=TrainConfig(output_dir=name))
    assert one_line(lambda: lock_folder(place).__enter__()).startswith(f"train.output_dir={name}: cannot be written")


def test_a_cache_folder_that_cannot_be_made_is_found_before_the_run(tmp_path: Path) -> None:
    config = job(tmp_path, cache_dir="/proc/no/folder")
    assert one_line(lambda: check_data(config)).startswith("data.cache_dir=/proc/no/folder: cannot be made")


def test_a_run_of_absurdly_many_epochs_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(job(tmp_path), train=TrainConfig(num_steps=10**12, global_batch_size=4))
    assert one_line(lambda: check_data(config)) == (
        "train.num_steps=1000000000000: must be at most 10000, which is 10,000 times through data.train"
    )


def test_two_runs_cannot_work_in_one_folder(tmp_path: Path) -> None:
    config = Config(train=TrainConfig(output_dir=str(tmp_path / "run"), resume=True))
    with lock_folder(config):
        message = one_line(lambda: lock_folder(config).__enter__())
    assert message.startswith(f"train.output_dir={tmp_path / 'run'}: another run is at work there")
    with lock_folder(config):
        pass


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "no locks here")

    monkeypatch.setattr("r1mega.train.run_folder.fcntl.flock", refuse)
    with lock_folder(Config(train=TrainConfig(output_dir=str(tmp_path)))):
        pass


@pytest.mark.parametrize("line", ["hello", '{"loss": 1}', "[1]", '{"step": "x"}'])
def test_metrics_that_are_not_the_runs_own_are_not_overwritten(tmp_path: Path, line: str) -> None:
    config = Config(train=TrainConfig(output_dir=str(tmp_path), resume=True))
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    assert "metrics.jsonl cannot be read" in one_line(lambda: prepare_folder(config))
    assert (tmp_path / "metrics.jsonl").read_text() == line + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_does_not_go_on_to_a_step_that_is_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(train=TrainConfig(output_dir=str(tmp_path), resume=True, num_steps=5))
    checkpoint = tmp_path / "checkpoints" / "step_00000006"
    checkpoint.mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("before")
    (checkpoint / "config.yaml").write_text(dump_config(config))
    (checkpoint / "progress.json").write_text(json.dumps({"step": 6, "tokens": 60}))
    monkeypatch.setattr("r1mega.train.checkpoint_files._needed_sizes", lambda path: {})
    message = one_line(lambda: prepare_folder(config))
    assert message == f"train.num_steps=5: must be at least 6, the step of {checkpoint}"
    assert (tmp_path / "config.yaml").read_text() == "before"


def test_progress_of_a_wrong_type_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"step": "x", "tokens": 3}')
    assert "progress.json cannot be read" in one_line(lambda: read_progress(tmp_path))


def test_a_file_that_cannot_be_written_is_named() -> None:
    assert _file_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == "No space left on device"
    assert _file_error(OSError(errno.EACCES, "Permission denied", "a.png")) == "Permission denied: a.png"


@pytest.mark.parametrize("header", [b"[]", b"3", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": 1}}'])
def test_a_safetensors_header_of_odd_json_is_one_line(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert one_line(lambda: read_entries(tmp_path)).endswith("is cut short or not a safetensors file")


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_a_corpus_without_text_is_one_line_and_leaves_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.txt").write_text(text)
    corpus = FileCorpus([str(tmp_path / "empty.txt")])
    assert one_line(lambda: prepare(corpus, tmp_path / "out", report=lambda line: None)) == "input: holds no text"
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


STOPPED = """
import sys
from r1mega import cli
def stop(argv):
    raise KeyboardInterrupt
cli.COMMANDS["layout"] = stop
sys.exit(cli.main(["layout"]))
"""


def test_ctrl_c_is_one_line_and_no_traceback() -> None:
    result = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "\nr1mega: stopped\n")
