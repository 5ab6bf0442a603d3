"""The addition task: what its completions say, how many are spoiled, and that the files never differ."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from r1mega.config import ConfigError
from r1mega.data import files
from r1mega.data.demonstrations import read_examples
from r1mega.data.tokenizer import Tokenizer
from r1mega.rl.tasks.addition import (
    TAGS,
    AdditionTask,
    completion,
    demonstrations,
    draw_pairs,
    write_addition,
)

ROOT = Path(__file__).parents[2]


def small(seed: int = 1234) -> AdditionTask:
    return AdditionTask(num_prompts=50, num_evaluation=20, num_demonstrations=60, seed=seed)


SMALL = small()
FIRST_PROMPTS = [{"prompt": "36+52=", "reference": "88"}, {"prompt": "81+45=", "reference": "126"}]
FIRST_DEMONSTRATION = {"prompt": "86+72=", "completion": "<think>6+2=8,8+7=5</think> <answer>48</answer>"}


def answer(text: str) -> int | None:
    found = re.fullmatch(r"<think>.*</think> <answer>(\d+)</answer>", text)
    return int(found[1]) if found else None


def total(prompt: str) -> int:
    a, b = prompt.removesuffix("=").split("+")
    return int(a) + int(b)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "a, b, text",
    [
        (47, 85, "<think>7+5=12,4+8+1=13</think> <answer>132</answer>"),
        (12, 34, "<think>2+4=6,1+3=4</think> <answer>46</answer>"),
        (905, 198, "<think>5+8=13,0+9+1=10,9+1+1=11</think> <answer>1103</answer>"),
    ],
)
def test_a_completion_adds_column_by_column(a: int, b: int, text: str) -> None:
    assert completion(a, b, random.Random(0)) == text


def test_a_completion_without_slips_is_right_for_all_numbers() -> None:
    assert all(answer(completion(a, b, random.Random(0))) == a + b for a in range(10, 100) for b in range(10, 100))


def test_a_slip_is_carried_on_and_a_mended_one_is_not() -> None:
    chance = random.Random(1)
    for _ in range(200):
        slipped = re.fullmatch(r"<think>7\+5=(\d+),4\+8(\+1)?=(\d+)</think>.*", completion(47, 85, chance, slip=1.0))
        assert slipped and slipped[1] != "12" and bool(slipped[2]) == (int(slipped[1]) >= 10)
        mended = completion(47, 85, chance, mended=0)
        assert answer(mended) == 132 and ",wait,7+5=12,4+8+1=13<" in mended and "7+5=12,wait" not in mended


def test_shares_of_spoiled_demonstrations_are_as_set() -> None:
    task = AdditionTask(num_demonstrations=4000, wrong_answer=0.6, broken_format=0.2, recheck=0.1)
    found = list(demonstrations(task, draw_pairs(task)[0]))
    whole = [line for line in found if all(tag in line["completion"] for tag in TAGS)]
    wrong = [line for line in whole if answer(line["completion"]) != total(line["prompt"])]
    rechecked = [line for line in found if "wait" in line["completion"]]
    assert len(whole) / len(found) == pytest.approx(0.8, abs=0.02)
    assert len(wrong) / len(whole) == pytest.approx(0.6, abs=0.03)
    assert len(rechecked) / len(found) == pytest.approx(0.1, abs=0.02)
    assert sorted({sum(tag not in line["completion"] for tag in TAGS) for line in found}) == [0, 1]


@pytest.mark.parametrize("digits", [1, 2, 3, 6])
def test_held_out_prompts_are_not_trained_on(digits: int) -> None:
    task = AdditionTask(digits, num_prompts=50, num_evaluation=31, num_demonstrations=300)
    train, held_out = draw_pairs(task)
    assert (len(set(train)), len(set(held_out))) == (50, 31) and not set(train) & set(held_out)
    assert {len(str(number)) for pair in train + held_out for number in pair} == {digits}
    trained = {f"{a}+{b}=" for a, b in train}
    assert {line["prompt"] for line in demonstrations(task, train)} <= trained


def test_two_folders_are_equal_byte_by_byte_and_another_seed_is_not(tmp_path: Path) -> None:
    first, second = write_addition(tmp_path / "a", SMALL), write_addition(tmp_path / "b", SMALL)
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted(
        ["demonstrations.jsonl", "evaluation.jsonl", "prompts.jsonl", "task.json"]
        + ["tokenizer.json", "tokenizer_config.json"]
    )
    assert all((first.folder / name).read_bytes() == (second.folder / name).read_bytes() for name in names)
    other = write_addition(tmp_path / "c", small(seed=2))
    assert all(
        (first.folder / name).read_bytes() != (other.folder / name).read_bytes()
        for name in ("demonstrations.jsonl", "evaluation.jsonl", "prompts.jsonl")
    )


def test_the_random_numbers_are_the_same_on_every_machine(tmp_path: Path) -> None:
    written = write_addition(tmp_path / "a", SMALL)
    assert read(written.prompts)[:2] == FIRST_PROMPTS
    assert read(written.demonstrations)[0] == FIRST_DEMONSTRATION


def test_references_are_right(tmp_path: Path) -> None:
    written = write_addition(tmp_path / "a", SMALL)
    for path, count in ((written.prompts, 50), (written.evaluation, 20)):
        lines = read(path)
        assert len(lines) == count and all(int(line["reference"]) == total(line["prompt"]) for line in lines)


def test_every_digit_sign_and_tag_is_one_token_and_text_comes_back(tmp_path: Path) -> None:
    written = write_addition(tmp_path / "a", SMALL)
    tokenizer = Tokenizer.load(written.folder)
    assert tokenizer.vocab_size <= 32 and tokenizer.bos_id is None
    text = "<think>7+5=11,wait,7+5=12</think> <answer>12</answer>"
    ids = tokenizer.encode(text, eos=True)
    assert len(ids) == 23 and ids[-1] == tokenizer.eos_id and tokenizer.decode(ids) == text
    for line in read(written.demonstrations):
        assert tokenizer.decode(tokenizer.encode(line["completion"], eos=True)) == line["completion"]
    assert tokenizer.encode("a") == [tokenizer.encode("<unk>")[0]]


def test_demonstrations_are_short(tmp_path: Path) -> None:
    written = write_addition(tmp_path / "a", AdditionTask(num_demonstrations=2000, recheck=0.5))
    examples = read_examples(str(written.demonstrations), Tokenizer.load(written.folder), tmp_path, "data.train")
    examples.check_lengths(40)
    assert 25 <= numpy.diff(examples.ends).mean() <= 35


def test_the_folder_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ConfigError, match="No space left"):
            write_addition(tmp_path / "a", SMALL)
    assert not (tmp_path / "a").exists()
    assert write_addition(tmp_path / "a", SMALL).is_new
    assert not write_addition(tmp_path / "a", SMALL).is_new


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    write_addition(tmp_path / "a", SMALL)
    with pytest.raises(ConfigError, match="a: is there already, made with other settings; name another folder"):
        write_addition(tmp_path / "a", small(seed=7))
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="b: is there already, not made by this command"):
        write_addition(tmp_path / "b", SMALL)
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"num_digits": 0}, "num_digits=0: must be 1 to 12"),
        ({"wrong_answer": 1.5}, "wrong_answer=1.5: must be a share between 0 and 1"),
        ({"num_prompts": 8000}, "num_prompts=8000: with num_evaluation .256. must be at most 8,100"),
        ({"num_demonstrations": 0}, "num_demonstrations=0: must be positive"),
    ],
)
def test_settings_that_cannot_work_are_one_line(settings: dict, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        AdditionTask(**settings)


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/make_addition.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)


def test_the_tool_makes_the_folder_and_says_what_it_did(tmp_path: Path) -> None:
    arguments = ("--output", str(tmp_path / "a"), "--num_demonstrations", "10", "--wrong_answer", "0")
    first, second = run_tool(*arguments), run_tool(*arguments)
    assert (first.returncode, first.stdout, first.stderr) == (0, f"make_addition: {tmp_path / 'a'}\n", "")
    assert second.returncode == 0 and second.stdout.endswith("nothing to do\n")
    assert len(read(tmp_path / "a" / "demonstrations.jsonl")) == 10
    other = run_tool("--output", str(tmp_path / "a"))
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "made with other settings" in other.stderr


def test_help_of_the_tool_names_every_setting() -> None:
    text = run_tool("--help").stdout
    assert all(f"--{name}" in text for name in AdditionTask.__dataclass_fields__)
    assert "r1mega sft" in text
