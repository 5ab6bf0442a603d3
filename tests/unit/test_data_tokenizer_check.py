"""A tokenizer that does not belong to the model or to the data is one line, with the numbers that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from r1mega.config import Config, ConfigError, DataConfig, ModelConfig
from r1mega.data.check import check_data
from r1mega.data.corpus import FileCorpus
from r1mega.data.prepare import Prepared, prepare
from r1mega.data.record import maker_of
from r1mega.data.tokenizer import Tokenizer, fingerprint
from r1mega.model.huggingface_tokenizer import write_tokenizer

WORDS = [f"{{ number {i}: the square is {i * i} }}\n  and the cube {i**3}.\n" for i in range(120)]
CODE = [f"def power_{i}(base):\n    return base ** {i}  # question {i}\n" for i in range(120)]


def make(folder: Path, texts: list[str], size: int) -> Prepared:
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = FileCorpus([str(folder / "in")])
    return prepare(corpus, folder / "out", vocab_size=size, valid_every=10, report=lambda line: None)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    """Two corpora, and the first encoded once more with a smaller vocabulary."""
    folder = tmp_path_factory.mktemp("corpora")
    kinds = {"words": (WORDS, 330), "small": (WORDS, 300), "code": (CODE, 330)}
    return {name: make(folder / name, *kind) for name, kind in kinds.items()}


def config(prepared: Prepared, tokenizer: str | None, vocab_size: int = 330, checkpoint: str | None = None) -> Config:
    data = DataConfig(train=[prepared.train], valid=[prepared.valid], tokenizer=tokenizer, sequence_length=8)
    return Config(model=ModelConfig(vocab_size=vocab_size, checkpoint=checkpoint), data=data)


def one_line(settings: Config, contents: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        check_data(settings, contents)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without_record(prepared: Prepared, folder: Path) -> Prepared:
    """Files as another program prepares them: nothing says which tokenizer they were made with."""
    shutil.copytree(prepared.folder, folder)
    (folder / "corpus.json").unlink()
    return Prepared(folder, str(folder / "train"), str(folder / "valid"), *[None] * 5, is_new=True)


def test_the_tokenizer_that_made_the_data_is_accepted_with_a_little_padding(corpora: dict[str, Prepared]) -> None:
    words = corpora["words"]
    for vocab_size in (330, 384, 330 + 1024):
        check_data(config(words, words.tokenizer, vocab_size))


def test_a_model_that_is_larger_than_padding_explains_is_refused(corpora: dict[str, Prepared]) -> None:
    words = corpora["words"]
    assert one_line(config(words, words.tokenizer, 4096)) == (
        f"model.vocab_size=4096: data.tokenizer ({words.tokenizer}) has only 330 tokens; must be 330 to 1354, "
        "or the tokenizer another"
    )


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(corpora: dict[str, Prepared]) -> None:
    words = corpora["words"]
    found = one_line(config(words, words.tokenizer, 320))
    assert found == f"model.vocab_size=320: must be at least 330, the size of data.tokenizer ({words.tokenizer})"


@pytest.mark.parametrize("other", ["small", "code"])
@pytest.mark.parametrize("contents", [True, False])
def test_data_that_another_tokenizer_made_are_refused_on_every_rank(
    corpora: dict[str, Prepared], other: str, contents: bool
) -> None:
    words, tokenizer = corpora["words"], corpora[other].tokenizer
    assert one_line(config(words, tokenizer), contents) == (
        f"data.tokenizer={tokenizer}: has {corpora[other].vocab_size} tokens and is another tokenizer than the one "
        f"that {words.train}.bin (data.train) was made with (330 tokens): {words.tokenizer}"
    )


def test_a_folder_made_before_the_fingerprint_was_recorded_is_checked_by_its_tokenizer(
    corpora: dict[str, Prepared], tmp_path: Path
) -> None:
    shutil.copytree(corpora["words"].folder, tmp_path / "old")
    record = json.loads((tmp_path / "old" / "corpus.json").read_text())
    del record["tokenizer_fingerprint"], record["files"]
    (tmp_path / "old" / "corpus.json").write_text(json.dumps(record))
    assert maker_of(str(tmp_path / "old" / "train"))[2] == maker_of(corpora["words"].train)[2]


def test_ids_that_the_tokenizer_does_not_have_are_refused_where_no_record_tells(
    corpora: dict[str, Prepared], tmp_path: Path
) -> None:
    words = without_record(corpora["words"], tmp_path / "theirs")
    found = one_line(config(words, corpora["small"].tokenizer))
    assert found.startswith(f"data.tokenizer={corpora['small'].tokenizer}: has 300 tokens, but {words.train}.bin (data")
    assert "holds token id 3" in found and found.endswith("name the tokenizer that it was made with")


def test_the_same_tokenizer_in_hugging_face_s_form_is_the_same(corpora: dict[str, Prepared], tmp_path: Path) -> None:
    words = corpora["words"]
    write_tokenizer(words.tokenizer, tmp_path, 4096)
    assert fingerprint(Tokenizer.load(tmp_path)) == fingerprint(Tokenizer.load(words.tokenizer))
    check_data(config(words, str(tmp_path)))


def test_a_checkpoint_s_own_tokenizer_decides(corpora: dict[str, Prepared], tmp_path: Path) -> None:
    words, code = corpora["words"], corpora["code"]
    write_tokenizer(code.tokenizer, tmp_path, 4096)
    check_data(config(code, code.tokenizer, 40960, checkpoint=str(tmp_path)))  # however much it pads
    assert one_line(config(words, words.tokenizer, checkpoint=str(tmp_path))) == (
        f"data.tokenizer={words.tokenizer}: has 330 tokens and is another than {tmp_path / 'tokenizer.json'} "
        "(330 tokens), the checkpoint's own; name that one"
    )
    found = one_line(config(words, None, checkpoint=str(tmp_path)))
    assert found.startswith(f"model.checkpoint={tmp_path / 'tokenizer.json'}: has 330 tokens and is another tokenizer")
