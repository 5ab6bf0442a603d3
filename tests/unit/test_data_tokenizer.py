"""The tokenizer: text comes back as it was, training is silent and deterministic."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.config import ConfigError
from r1mega.data.tokenizer import SYMBOLS, Tokenizer, train_tokenizer

TEXTS = [f"def f_{i}(x):\n    return x * {i} + {i * 7}  # 北京\n" for i in range(200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, 300, path)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "  two  spaces  ",
        "tab\tand\r\nreturn",
        "\0",
        "ﬁ ①",
        "北京 🚀",
        "<think>\nx</think><answer>72</answer>",
    ],
)
def test_any_text_comes_back_as_it_was(model: Path, text: str) -> None:
    tokenizer = Tokenizer.load(model)
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.decode(ids) == text
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert min(ids) >= 0 and max(ids) < tokenizer.vocab_size == 300


def test_symbols_and_digits_are_single_tokens(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    assert set(tokenizer.special_tokens) == set(SYMBOLS)
    for symbol, index in tokenizer.special_tokens.items():
        assert tokenizer.encode(symbol) == [index]
    assert len(tokenizer.encode("2024")) == 4


def test_text_that_spells_a_control_token_does_not_become_one(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    assert tokenizer.eos_id not in tokenizer.encode("<｜end▁of▁sentence｜>")


def test_training_is_silent_and_gives_the_same_bytes(tmp_path: Path, model: Path, capfd: pytest.CaptureFixture) -> None:
    train_tokenizer(TEXTS, 300, tmp_path / "again.model")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("vocab_size", [200, 5000])
def test_vocabulary_that_cannot_be_is_one_line(tmp_path: Path, vocab_size: int, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError, match=f"^vocab_size={vocab_size}: [^\n]*$"):
        train_tokenizer(TEXTS, vocab_size, tmp_path / "x.model")
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "x.model").exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_damaged_tokenizer_is_one_line_that_names_the_file(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / name).write_bytes(b"\x08\x96not a tokenizer")
    with pytest.raises(ConfigError, match=rf"^data.tokenizer=[^\n]*{name}[^\n]*$"):
        Tokenizer.load(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_cut_short_model_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"^data.tokenizer=[^\n]*$"):
        Tokenizer.load(tmp_path)


def test_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"^data.tokenizer=[^\n]*$"):
            Tokenizer.load(path)


def test_hugging_face_tokenizer_loads_and_takes_its_end_token_from_its_config(tmp_path: Path) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<done>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="eos_token"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<done>"}}')
    loaded = Tokenizer.load(tmp_path)
    text = "  北京 <think>def f(x)\n"
    assert loaded.decode(loaded.encode(text, bos=True, eos=True)) == text
    assert loaded.eos_id == 1 and loaded.bos_id == 0
    assert loaded.vocab_size == tokenizer.get_vocab_size() and "<think>" in loaded.special_tokens
    (tmp_path / "copy").mkdir()
    loaded.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eos_id == 1
