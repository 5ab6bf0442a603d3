"""An exported tokenizer, loaded by transformers' AutoTokenizer, encodes as sentencepiece does."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import transformers

from r1mega.config import ConfigError
from r1mega.data.tokenizer import train_tokenizer
from r1mega.model.huggingface_config import CONFIG_FILE
from r1mega.model.huggingface_tokenizer import write_tokenizer

PARTS = [
    *(" ", "  ", "    ", "a", "e", "=", "--", "#", "\n", "\t", "0", "12", "self", "_", "..", "*", "return", "tion"),
    *("<think>", "</think>", "<thi", "<\uff5cUser\uff5c>", "<unk>", "<0x41>", "\u2581", "\x00", "\u00a0", "\ufeff"),
    *("\u00e9", "\u4f60\u597d", "\U0001f600", "\U0001f468\u200d\U0001f469", "\ufb01", "A\u030a", "\u0627"),
]


def sources() -> list[str]:
    """Real text: modules of the standard library, some of which are full of other scripts."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [
        path.read_text(encoding="utf-8")
        for path in [*sorted(folder.glob("*.py"))[:60], folder / "encodings/aliases.py"]
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The sentencepiece model and transformers' form of it, in a folder that says it is a DeepSeek-V3."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sources(), 1500, folder / "made.model")
    ids = write_tokenizer(str(folder / "made.model"), folder, max_length=10**9)
    (folder / CONFIG_FILE).write_text('{"model_type": "deepseek_v3"}')
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "made.model"))
    return model, transformers.AutoTokenizer.from_pretrained(folder), ids


def assert_same(pair, text: str) -> None:
    model, tokenizer, _ = pair
    ids = model.encode(text)
    assert tokenizer(text)["input_ids"] == ids, text
    assert tokenizer.decode(ids) == model.decode(ids), text


def test_real_text_gets_the_same_ids_and_comes_back(pair):
    for text in sources():
        assert_same(pair, text)


def test_spaces_repetitions_symbols_and_unicode_get_the_same_ids(pair):
    dice = random.Random(0)
    for _ in range(3000):
        assert_same(pair, "".join(dice.choice(PARTS) for _ in range(dice.randint(0, 30))))
    for _ in range(1000):
        period = "".join(dice.choice("abcdein =-_.#*\u2581") for _ in range(dice.randint(1, 4)))
        assert_same(pair, period * dice.randint(1, 40) + dice.choice(PARTS))
    for _ in range(1000):
        assert_same(pair, "".join(chr(dice.randint(0x80, 0xD7FF)) for _ in range(dice.randint(0, 20))))


def test_control_tokens_are_known_and_none_is_added_by_itself(pair):
    model, tokenizer, ids = pair
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.bos_id(), model.eos_id())
    assert ids == {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "pad_token_id": None}
    assert tokenizer(f"{tokenizer.bos_token}<\uff5cUser\uff5c>hi")["input_ids"] == [
        model.bos_id(),
        *model.encode("<\uff5cUser\uff5c>hi"),
    ]
    assert tokenizer.decode([model.bos_id(), *model.encode("hi")], skip_special_tokens=True) == "hi"


def test_a_model_that_normalises_its_text_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be"] * 50), model_prefix=str(tmp_path / "m"), model_type="bpe",
        vocab_size=24, minloglevel=3,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="normalises its text, which the export cannot convert"):
        write_tokenizer(str(tmp_path / "m.model"), tmp_path, 100)


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer=nowhere\.model: there is no such file"):
        write_tokenizer("nowhere.model", tmp_path, 100)
