"""From text to .bin/.idx: nothing lost, nothing half done, every error one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1mega.config import Config, ConfigError, DataConfig
from r1mega.data.check import check_data
from r1mega.data.corpus import DefaultCorpus, FileCorpus, solved_problems, sympy_sources
from r1mega.data.index import checksum, read_index
from r1mega.data.prepare import Prepared, prepare
from r1mega.data.tokenizer import Tokenizer
from tests.unit.test_data_dataset import run_and_die
from tools.prepare_data import main

TEXTS = [f"{{ number {i}: the square is {i * i} }}\n  and the cube {i**3}.\n" for i in range(120)]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "inputs"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:100]) + "\n")
    for i, text in enumerate(TEXTS[100:]):
        (folder / "deep" / f"{i:02d}.txt").write_text(text)
    (folder / "ignored.bin").write_bytes(b"\xff\xff")
    return folder


def documents(prefix: str | None, tokenizer: Tokenizer) -> list[str]:
    assert prefix is not None
    index = read_index(prefix, "data")
    ends = index.lengths.cumsum()
    tokens = [index.tokens()[end - length : end].tolist() for end, length in zip(ends, index.lengths, strict=True)]
    assert all(ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1] for ids in tokens)
    return [tokenizer.decode(ids) for ids in tokens]


def run(corpus: FileCorpus, output: Path, **settings: Any) -> Prepared:
    return prepare(corpus, output, vocab_size=320, report=lambda line: None, **settings)


def test_every_document_comes_back_and_one_in_n_is_held_out(inputs: Path, tmp_path: Path) -> None:
    prepared = run(FileCorpus([str(inputs)]), tmp_path / "out", valid_every=10)
    tokenizer = Tokenizer.load(prepared.tokenizer)
    assert documents(prepared.valid, tokenizer) == TEXTS[9::10]
    assert documents(prepared.train, tokenizer) == [text for i, text in enumerate(TEXTS, start=1) if i % 10]
    assert prepared.checksum == checksum([prepared.train])
    assert prepared.train_tokens == read_index(prepared.train, "data").num_tokens


def test_few_long_documents_give_their_ends_for_validation(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(TEXTS))
    prepared = run(FileCorpus([str(tmp_path / "one.txt")]), tmp_path / "out", valid_every=10)
    tokenizer = Tokenizer.load(prepared.tokenizer)
    (train,), (valid,) = documents(prepared.train, tokenizer), documents(prepared.valid, tokenizer)
    assert train + valid == "".join(TEXTS) and train.endswith("\n")
    assert 0.08 < len(valid) / len(train) < 0.13


def test_no_validation_leaves_no_validation_files(inputs: Path, tmp_path: Path) -> None:
    prepared = run(FileCorpus([str(inputs)]), tmp_path / "out", valid_every=0)
    assert prepared.valid is None and not (tmp_path / "out" / "valid.bin").exists()


def test_same_arguments_again_do_nothing_and_others_are_refused(inputs: Path, tmp_path: Path) -> None:
    first = run(FileCorpus([str(inputs)]), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    again = run(FileCorpus([str(inputs)]), tmp_path / "out")
    assert first.is_new and not again.is_new and again.checksum == first.checksum
    for attempt in (
        lambda: run(FileCorpus([str(inputs)]), tmp_path / "out", valid_every=7),
        lambda: run(FileCorpus([str(inputs / "deep")]), tmp_path / "out"),
        lambda: run(FileCorpus([str(inputs)]), tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"^output=[^\n]*$"):
            attempt()
    assert before == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def test_same_input_gives_the_same_bytes_and_a_tokenizer_can_be_reused(inputs: Path, tmp_path: Path) -> None:
    first, second = (run(FileCorpus([str(inputs)]), tmp_path / name) for name in ("1", "2"))
    third = run(FileCorpus([str(inputs)]), tmp_path / "3", tokenizer=first.tokenizer)
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model"):
        contents = {(prepared.folder / name).read_bytes() for prepared in (first, second, third)}
        assert len(contents) == 1, name


class DyingCorpus(FileCorpus):
    """Kills its process in the middle of the second reading, which is the encoding."""

    readings = 0

    def __iter__(self) -> Iterator[str]:
        self.readings += 1
        for number, text in enumerate(super().__iter__()):
            if self.readings == 2 and number == 60:
                os.kill(os.getpid(), signal.SIGKILL)
            yield text


def test_killed_in_the_middle_nothing_looks_complete_and_the_next_run_succeeds(inputs: Path, tmp_path: Path) -> None:
    run_and_die(lambda: run(DyingCorpus([str(inputs)]), tmp_path / "out"))
    assert (tmp_path / ".out.partial" / "train.bin").exists() and not (tmp_path / "out").exists()
    prepared = run(FileCorpus([str(inputs)]), tmp_path / "out")
    assert prepared.is_new and prepared.checksum == run(FileCorpus([str(inputs)]), tmp_path / "other").checksum
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "other", "out"]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("x.txt", b"fine\nnot \xff fine", r"x\.txt: not UTF-8 at byte 9 \(0xff\)"),
        ("x.jsonl", b'{"text": "fine"}\n{"text": "not \xff fine"}\n', r"x\.jsonl: not UTF-8 at byte 31 \(0xff\)"),
        ("x.jsonl", b'{"text": "fine"}\n{"text": \n', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", b'{"body": "fine"}\n', r"x\.jsonl:1: has no text under the key 'text'"),
        ("x.jsonl", b"[1]\n", r"x\.jsonl:1: has no text"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', r"x\.jsonl:1: half of a surrogate"),
        ("x.txt", b" \n", "holds no text"),
    ],
)
def test_input_that_cannot_be_read_is_one_line_and_leaves_nothing(
    inputs: Path, tmp_path: Path, name: str, content: bytes, error: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_bytes(content)
    tokenizer = run(FileCorpus([str(inputs)]), tmp_path / "good").tokenizer
    status = main(["--input", str(tmp_path / name), "--output", str(tmp_path / "out"), "--tokenizer", tokenizer])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.err.count("\n") == 1
    with pytest.raises(ConfigError, match=error):
        run(FileCorpus([str(tmp_path / name)]), tmp_path / "out", tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["good", "inputs", name])


def test_missing_input_and_empty_folder_are_one_line(tmp_path: Path) -> None:
    for name in ("nowhere", "."):
        with pytest.raises(ConfigError, match=r"^input=[^\n]*$"):
            FileCorpus([str(tmp_path / name)])


DAMAGE = {
    "train.bin is missing": lambda folder: (folder / "train.bin").unlink(),
    "valid.idx is missing": lambda folder: (folder / "valid.idx").unlink(),
    "tokenizer.model is missing": lambda folder: (folder / "tokenizer.model").unlink(),
    "corpus.json is missing": lambda folder: (folder / "corpus.json").unlink(),
    "corpus.json cannot be read": lambda folder: os.truncate(folder / "corpus.json", 9),
    "train.bin has 100 bytes, not": lambda folder: os.truncate(folder / "train.bin", 100),
    "tokenizer.model has 100 bytes, not": lambda folder: os.truncate(folder / "tokenizer.model", 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_not_called_complete_and_is_made_again_where_it_may(
    inputs: Path, tmp_path: Path, damage: str
) -> None:
    corpus, lines = FileCorpus([str(inputs)]), []
    whole = run(corpus, tmp_path / "out")
    (tmp_path / "out" / "cache").mkdir()
    DAMAGE[damage](tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        run(corpus, tmp_path / "out")
    assert damage in str(caught.value) and "delete" in str(caught.value) and "\n" not in str(caught.value)
    again = prepare(corpus, tmp_path / "out", vocab_size=320, report=lines.append, rebuild_damaged=True)
    assert again.is_new and again.checksum == whole.checksum
    assert [line for line in lines if "damaged" in line][0].startswith(f"{tmp_path / 'out'} is damaged ({damage}")
    assert not run(corpus, tmp_path / "out").is_new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "out"]


def test_a_folder_with_files_of_the_users_is_never_made_again(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not made by this command"):
        run(FileCorpus([str(inputs)]), tmp_path / "out", rebuild_damaged=True)
    prepared = run(FileCorpus([str(inputs)]), tmp_path / "mine")
    (prepared.folder / "train.bin").unlink()
    with pytest.raises(ConfigError, match="was made with another valid_every"):
        run(FileCorpus([str(inputs)]), prepared.folder, valid_every=7, rebuild_damaged=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine" and (prepared.folder / "train.idx").exists()


def test_training_on_a_damaged_folder_says_how_to_mend_it(inputs: Path, tmp_path: Path) -> None:
    prepared = run(FileCorpus([str(inputs)]), tmp_path / "out")
    os.truncate(tmp_path / "out" / "train.bin", 100)
    config = Config(data=DataConfig(train=[prepared.train], tokenizer=prepared.tokenizer, sequence_length=8))
    config.model.vocab_size = 320
    with pytest.raises(ConfigError, match=r"^data\.train=[^\n]*is cut short[^\n]*delete it and prepare it again$"):
        check_data(config)
    (tmp_path / "out" / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"^data\.tokenizer=[^\n]*no such file[^\n]*delete it and prepare it again$"):
        check_data(config)


def test_a_place_that_cannot_be_written_is_one_line_that_names_it(inputs: Path) -> None:
    for place in ("/proc/nowhere", "/proc/nowhere/deep"):
        with pytest.raises(ConfigError, match=rf"^output={place}: cannot be written \([^\n]*\); name another folder$"):
            run(FileCorpus([str(inputs)]), Path(place))


@pytest.mark.parametrize("vocab_size", [300, 4096])
def test_a_text_that_is_too_small_says_which_vocabulary_would_fit(tmp_path: Path, vocab_size: int) -> None:
    (tmp_path / "small.txt").write_text("hello world")
    with pytest.raises(ConfigError) as caught:
        prepare(
            FileCorpus([str(tmp_path / "small.txt")]), tmp_path / "out", vocab_size=vocab_size, report=lambda _: None
        )
    assert str(caught.value) == f"vocab_size={vocab_size}: the text is too small for it; must be at most 292"


def test_a_reader_that_goes_away_is_no_error(inputs: Path, tmp_path: Path) -> None:
    arguments = f"--input {inputs} --output {tmp_path / 'out'} --vocab_size 320"
    root = Path(__file__).parents[2]
    # The reader has gone before the first line.
    command = f"{sys.executable} -u {root / 'tools/prepare_data.py'} {arguments} | true"
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stderr == ""


def test_command_prints_settings_that_load(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import yaml

    arguments = ["--input", str(inputs), "--output", str(tmp_path / "out"), "--vocab_size", "320"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    data = yaml.safe_load(printed.out[printed.out.index("data:\n") :])["data"]
    assert data["checksum"] == checksum(data["train"]) and Tokenizer.load(data["tokenizer"]).vocab_size == 320
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_default_corpus_refuses_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.13.0")
    with pytest.raises(ConfigError, match=r"^default corpus: needs sympy 1\.14\.0, found 1\.13\.0 version[^\n]*$"):
        DefaultCorpus()


def test_default_corpus_is_the_same_in_every_process() -> None:
    """Pinned: strings hash differently in every process, so a corpus that depends on it would fail here."""
    import hashlib

    sources = hashlib.sha256("".join(sympy_sources()).encode()).hexdigest()
    problems = hashlib.sha256("".join(text for texts in solved_problems(20, 7) for text in texts).encode()).hexdigest()
    assert (sources[:16], problems[:16]) == ("7ec777931d92f31e", "a8a8dc0843b6bae8")
