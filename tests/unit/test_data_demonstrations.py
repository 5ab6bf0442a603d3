"""Demonstrations: which labels count, in which order examples come, and one line for every file that is not right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from r1mega import cli
from r1mega.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from r1mega.data.check import check_data
from r1mega.data.dataset import build_dataset
from r1mega.data.demonstrations import DemonstrationDataset, are_demonstrations
from r1mega.data.index import checksum
from r1mega.data.loader import StepLoader
from r1mega.data.tokenizer import Tokenizer
from r1mega.rl.tasks.addition import tokenizer_files

SEQUENCE = 12
EXAMPLES = [("1+2=", "3"), ("20+22=", "42"), ("9+9=", "18")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a character, an end token, no begin token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, text in tokenizer_files().items():
        (folder / name).write_text(text)
    return Tokenizer.load(folder)


def write(path: Path, examples: list[tuple[str, str]] = EXAMPLES) -> str:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in examples]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def build(paths: list[str], tokenizer: Tokenizer, num_samples: int, seed: int = 1) -> DemonstrationDataset:
    dataset = build_dataset(paths, SEQUENCE, num_samples, seed, tokenizer=tokenizer)
    assert isinstance(dataset, DemonstrationDataset)
    return dataset


def text(tokenizer: Tokenizer, ids: torch.Tensor) -> str:
    """Token by token, with the end token."""
    return "".join("$" if i == tokenizer.eos_id else tokenizer.decode([i]) for i in ids.tolist())


def questions(dataset: DemonstrationDataset, tokenizer: Tokenizer) -> list[str]:
    return [text(tokenizer, dataset[i]["tokens"]).split("=")[0] for i in range(len(dataset))]


def config(paths: list[str], tokenizer: Tokenizer | None, **data: object) -> Config:
    folder = None if tokenizer is None else str(tokenizer.path.parent)
    model = ModelConfig(vocab_size=32)
    return Config(model=model, data=DataConfig(train=paths, tokenizer=folder, sequence_length=SEQUENCE, **data))


def one_line(settings: Config, contents: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        check_data(settings, contents)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_loss_is_on_the_completion_and_its_end_and_nothing_else(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sample = build([write(tmp_path / "a.jsonl", [("20+22=", "42")])], tokenizer, 1)[0]
    assert text(tokenizer, sample["tokens"]) == "20+22=42$$$$"
    assert text(tokenizer, sample["labels"]) == "0+22=42$$$$$"
    assert text(tokenizer, sample["labels"][sample["loss_mask"]]) == "42$"
    assert text(tokenizer, sample["tokens"][sample["counted"]]) == "20+22=42"
    assert [sample[name].dtype for name in ("tokens", "labels", "loss_mask", "counted")] == [
        *2 * [torch.int64],
        *2 * [torch.bool],
    ]


def test_a_prompt_begins_with_the_begin_token_where_there_is_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    begins = Tokenizer.load(tokenizer.path.parent)
    begins.bos_id = tokenizer.encode("+")[0]
    sample = build([write(tmp_path / "a.jsonl", [("9=", "18")])], begins, 1)[0]
    assert text(tokenizer, sample["tokens"][sample["counted"]]) == "+9=18"
    assert text(tokenizer, sample["labels"][sample["loss_mask"]]) == "18$"


def test_an_example_may_fill_the_sample(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("1=", "2" * (SEQUENCE - 2))])
    sample = build([path], tokenizer, 1)[0]
    assert int(sample["loss_mask"].sum()) == SEQUENCE - 1 and bool(sample["counted"].all())
    assert sample["labels"][-1] == tokenizer.eos_id


def test_every_epoch_has_every_example_once_in_an_order_of_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.jsonl", [(f"{i}=", "1") for i in range(20)]),
        write(tmp_path / "b.jsonl", [(f"{i}=", "1") for i in range(20, 50)]),
    ]
    asked = questions(build(paths, tokenizer, 100), tokenizer)
    everything = {str(i) for i in range(50)}
    assert set(asked[:50]) == set(asked[50:]) == everything
    assert asked[:50] != asked[50:] and asked[:50] != sorted(asked[:50], key=int)


def test_the_order_is_a_function_of_seed_epoch_and_index(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [(f"{i}=", "1") for i in range(50)])
    long = build([path], tokenizer, 120)
    asked = questions(long, tokenizer)
    assert questions(build([path], tokenizer, 70), tokenizer) == asked[:70]
    assert [text(tokenizer, long[i]["tokens"]).split("=")[0] for i in (119, 3, 60)] == [asked[i] for i in (119, 3, 60)]
    assert questions(build([path], tokenizer, 120, seed=2), tokenizer) != asked
    assert questions(build([path], tokenizer, 120, seed=1 + 2**32), tokenizer) != asked


def test_a_file_that_is_named_twice_is_read_twice_as_often(tokenizer: Tokenizer, tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", [("1=", "1")]), write(tmp_path / "b.jsonl", [("2=", "1")])
    assert sorted(questions(build([one, two, one], tokenizer, 3), tokenizer)) == ["1", "1", "2"]


def test_the_count_of_labels_is_that_of_the_masks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = build([write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", [("1=", "1111")])], tokenizer, 8)
    assert [dataset.num_loss_tokens(i) for i in range(8)] == [int(dataset[i]["loss_mask"].sum()) for i in range(8)]


def test_a_global_batch_is_the_same_on_any_layout_and_leaves_padding_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = build([write(tmp_path / "a.jsonl")], tokenizer, 12)
    whole = StepLoader(dataset, 0, 1, 4, 4, prefetch=False).step(1)[0]
    parts = [batch for rank in (0, 1) for batch in StepLoader(dataset, rank, 2, 4, 1, prefetch=False).step(1)]
    assert {batch.num_loss_tokens for batch in parts} == {whole.num_loss_tokens} == {int(whole.loss_mask.sum())}
    for name in ("tokens", "labels", "loss_mask", "counted"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in parts]), getattr(whole, name))
    assert not bool(whole.counted.all())


def test_files_are_encoded_once_and_anew_when_they_change(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl")
    check_data(config([path], tokenizer))
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", None)
        assert len(build([path], tokenizer, 3)[0]["tokens"]) == SEQUENCE
    write(tmp_path / "a.jsonl", [("8+1=", "9")])
    assert questions(build([path], tokenizer, 1), tokenizer) == ["8+1"]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff{}", "is not UTF-8"),
        (b'["1=", "1"]', 'must be an object with "prompt" and "completion"'),
        (b'{"prompt": "1="}', 'must have "completion", a text that is not empty'),
        (b'{"prompt": "", "completion": "1"}', 'must have "prompt", a text that is not empty'),
        (b'{"prompt": 5, "completion": "1"}', 'must have "prompt", a text that is not empty'),
        (b'{"prompt": "1=", "completion": "\\ud800"}', 'its "completion" is not Unicode text'),
    ],
)
def test_a_line_that_is_no_demonstration_is_named(
    tokenizer: Tokenizer, tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "1=", "completion": "1"}\n\n' + line + b"\n")
    found = one_line(config([str(path)], tokenizer))
    assert found.startswith(f"data.train={path}: line 3") and reason in found
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == []


def test_lines_end_at_line_feeds_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1=", "completion": "1\u2028\u00852"}\nno\n', encoding="utf-8")
    assert f"{path}: line 2 is not JSON" in one_line(config([str(path)], tokenizer))


def test_examples_that_are_too_long_are_counted_and_the_longest_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("1=", "1"), ("1=", "1" * 11), ("1=", "1" * 30), ("1=", "1" * 10)])
    found = one_line(config([path], tokenizer))
    assert found.startswith(f"data.sequence_length={SEQUENCE}: 2 of 4 examples are too long in {path}")
    assert "(line 3) needs 32" in found
    with pytest.raises(ConfigError, match="2 of 4"):
        build([path], tokenizer, 4)


def test_other_mistakes_are_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, empty = write(tmp_path / "a.jsonl"), tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    there = f"data.train={tmp_path / 'b.jsonl'}: there is no such file"
    assert one_line(config([str(tmp_path / "b.jsonl")], tokenizer), contents=False) == there
    assert one_line(config([str(empty)], tokenizer)) == f"data.train={empty}: holds no demonstrations"
    assert one_line(config([path], None)).startswith("data.tokenizer=null: must be given, because data.train holds")
    assert "either all are demonstrations (.jsonl) or none is" in one_line(config([path, "corpus"], tokenizer))
    assert "demonstrations have no weights" in one_line(config(["0.5", path], tokenizer))
    assert "data.valid" in one_line(config([path], tokenizer, valid=[str(empty)]))
    (tmp_path / "file").write_text("")
    assert "cannot be made" in one_line(config([path], tokenizer, cache_dir=str(tmp_path / "file" / "cache")))
    settings = config([path], tokenizer)
    settings.train = TrainConfig(num_steps=10**9, global_batch_size=4)
    assert "train.num_steps=1000000000: must be at most 7500" in one_line(settings)


def test_a_checksum_holds_for_demonstrations_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl")
    check_data(config([path], tokenizer, checksum=checksum([path])))
    assert one_line(config([path], tokenizer, checksum="0")).startswith("data.checksum=0: the files of data.train")


def test_prefixes_are_no_demonstrations_and_nothing_is_none() -> None:
    assert are_demonstrations(["a.jsonl", "b.jsonl"], "data.train")
    assert not are_demonstrations(["0.5", "a", "0.5", "b"], "data.train")
    assert not are_demonstrations([], "data.valid")


def test_sft_refuses_what_is_no_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", '--data.train=["data/default/train"]']) == 2
    line = capsys.readouterr().err
    assert line.startswith("r1mega: error: data.train=['data/default/train']: must be files of demonstrations (.jsonl)")


def test_sft_hands_demonstrations_to_the_training_program(
    tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Config] = []
    monkeypatch.setattr("r1mega.train.pretrain.pretrain", lambda config: called.append(config) or 0)
    assert cli.main(["sft", f'--data.train=["{write(tmp_path / "a.jsonl")}"]']) == 0
    assert called[0].train.output_dir == "runs/sft"
