"""The files of completions and evaluations, and the measures of a rollout."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1mega.parallel_state import ParallelState
from r1mega.rl.completions import drop_after, read_completions, write_completions
from r1mega.rl.evaluator import drop_evaluations, keep_evaluation, read_evaluations
from r1mega.rl.experience import Group
from r1mega.rl.grpo import _plain
from r1mega.rl.measures import Measures, of_groups
from r1mega.rl.prompts import Prompt
from r1mega.rl.rewards import Scores
from r1mega.rl.rollout.engine import Completion


def line(step: int, prompt_index: int, sample: int, **more) -> dict:
    return {"step": step, "prompt_index": prompt_index, "sample": sample, **more}


def test_completions_are_read_back_step_by_step_prompt_by_prompt_whoever_wrote_them(tmp_path: Path) -> None:
    write_completions(tmp_path, 11, 0, [line(11, 0, 0)])
    write_completions(tmp_path, 2, 1, [line(2, 1, 0), line(2, 1, 1, completion="é\n\u2028 \ufffd")])
    write_completions(tmp_path, 2, 0, [line(2, 0, 1), line(2, 0, 0)])
    write_completions(tmp_path, 2, 10, [])
    found = [(entry["step"], entry["prompt_index"], entry["sample"]) for entry in read_completions(tmp_path)]
    assert found == [(2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1), (11, 0, 0)]
    assert list(read_completions(tmp_path))[3]["completion"] == "é\n\u2028 \ufffd"


def test_a_folder_without_completions_has_none(tmp_path: Path) -> None:
    assert list(read_completions(tmp_path)) == []
    drop_after(tmp_path, 0)


def test_the_same_completions_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_completions(tmp_path / name, 1, 0, [line(1, 0, 0)])
    files = [next((tmp_path / name / "completions").iterdir()) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    write_completions(tmp_path, 1, 0, [line(1, 0, 0)])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_completions(tmp_path, 1, 0, [line(1, 0, 1)])
    assert [entry["sample"] for entry in read_completions(tmp_path)] == [0]
    assert len(list((tmp_path / "completions").iterdir())) == 1


def test_what_a_run_will_make_again_is_dropped(tmp_path: Path) -> None:
    for step in (1, 3, 5):
        write_completions(tmp_path, step, 0, [line(step, 0, 0)])
    half = tmp_path / "completions" / ".step_00000007.00000.jsonl.gz.tmp"
    half.write_bytes(b"half")
    drop_after(tmp_path, 3)
    assert [entry["step"] for entry in read_completions(tmp_path)] == [1, 3]
    assert not half.exists()


def test_an_evaluation_takes_the_place_of_what_was_there_for_its_step_and_later_ones(tmp_path: Path) -> None:
    for step in (0, 4, 6):
        keep_evaluation(tmp_path, {"step": step, "pass@1": 0.1})
    keep_evaluation(tmp_path, {"step": 4, "pass@1": 0.5})
    assert read_evaluations(tmp_path) == [{"step": 0, "pass@1": 0.1}, {"step": 4, "pass@1": 0.5}]
    drop_evaluations(tmp_path, 2)
    assert [record["step"] for record in read_evaluations(tmp_path)] == [0]
    drop_evaluations(tmp_path / "nowhere", 2)


def test_what_is_shown_of_a_completion_is_one_line_that_commands_no_terminal() -> None:
    assert _plain("1+1=\n\x1b[2J\x07 2\r \u202e é") == "1+1= \ufffd[2J\ufffd 2 \ufffd é"
    assert len(_plain("x" * 10_000)) < 1000


def measures() -> Measures:
    return Measures(ParallelState.single_process())


def test_measures_are_means_sums_and_maxima() -> None:
    found = measures()
    found.add("mean", 1.0)
    found.add("mean", 6.0, 3)
    found.total("sum", 2.0)
    found.total("sum", 3.0)
    found.same("same", 7.0)
    for count, ratio, largest in ((2, 2.0, 1.5), (1, 4.0, 3.0)):
        values = {"num_tokens": count, "ratio": ratio, "ratio_max": largest}
        found.loss({name: torch.tensor(float(value)) for name, value in values.items()})
    means = found.means()
    assert means == {"mean": 7 / 4, "sum": 5.0, "same": 7.0, "ratio": 2.0, "ratio_max": 3.0}


def test_a_step_without_tokens_in_the_loss_has_no_division_by_zero() -> None:
    found = measures()
    found.loss({"num_tokens": torch.tensor(0.0), "ratio": torch.tensor(0.0), "ratio_max": torch.tensor(0.0)})
    assert found.means() == {"ratio": 0.0, "ratio_max": 0.0}


def test_measures_of_groups_count_failures_and_flat_groups() -> None:
    scores = [Scores(1.5, {"a": 1.0, "b": 0.5}), Scores(0.5, {"a": 0.0, "b": 0.5}, {"a": "raised: no"})]
    completions = [Completion(0, i, [1], [5] * (i + 1), torch.zeros(i + 1), finished=i == 0) for i in range(2)]
    groups = [
        Group(0, Prompt("p"), "p", completions, [1.5, 0.5], scores, [1.0, -1.0], 0.5, False),
        Group(1, Prompt("p"), "p", completions, [1.5, 1.5], [scores[0]] * 2, [0.0, 0.0], 0.0, True),
    ]
    found, leader = measures(), SimpleNamespace(is_leader=True, decode=lambda completion: "wait")
    of_groups(found, groups, leader)
    means = found.means()
    assert means["reward"] == 1.25 and means["reward/a"] == 0.75 and means["reward_failures/a"] == 1.0
    assert means["reward_failures/b"] == 0.0 and means["flat_groups"] == 0.5 and means["reward_std"] == 0.25
    assert means["response_length"] == 1.5 and means["truncated"] == 0.5 and means["reflection_words"] == 1.0
    other = measures()
    of_groups(other, groups, SimpleNamespace(is_leader=False))
    assert other.means() == {}
