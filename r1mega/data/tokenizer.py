"""Tokenizers: sentencepiece ``.model`` files, trained here or elsewhere, and Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
# What the R1 recipe puts into text; a newline is a symbol so that no token crosses a line.
SYMBOLS = ("\n", "<think>", "</think>", "<answer>", "</answer>", "<｜User｜>", "<｜Assistant｜>")
_SYMBOL_AND_BYTE_TOKENS = 3 + len(SYMBOLS) + 256
_LONGEST_PIECE = 4000  # characters; sentencepiece drops longer lines of its training text
# Words, code, mathematics, several scripts: two vocabularies of different origin cut them differently.
_FINGERPRINT_TEXT = """\
The quick brown fox jumps over the lazy dog; however, training that reasoning model takes information about questions.
Question: What is 12 + 30? Answer: 42. Let x = 3.14159 and solve for y: 2x^2 - 7y = sqrt(16), where 0 <= y < 10.
def function(self, other, **kwargs):
    if isinstance(other, (int, float)) and other is not None:
        return [str(value) for value in self.values() if value == other]  # the result is an expression
naïve café, Straße, привет мир, \u4f60\u597d\uff0c\u4e16\u754c
"""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        path: the file it was read from.
        vocab_size: highest token id + 1.
        bos_id: id that begins a text; None where the tokenizer has none.
        eos_id: id that ends a document.
        special_tokens: ids of the symbols that stand for themselves, by name (``<think>``).
    """

    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    special_tokens: dict[str, int]

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a sentencepiece ``.model``, a ``tokenizer.json``, or a folder that holds one of them.

        Raises :class:`ConfigError` of one line where there is none or it cannot be read.
        """
        try:
            file = _find_file(Path(path))
            return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
        except OSError as error:
            raise ConfigError(f"data.tokenizer={path}: cannot be read: {error.strerror}") from error

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of ``text``, with ``bos_id`` before and ``eos_id`` after it if asked for."""
        before = [self.bos_id] if bos and self.bos_id is not None else []
        return before + self._encode(text) + ([self.eos_id] if eos else [])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; control tokens (begin, end) are left out."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> Path:
        """Copy the tokenizer's files into ``folder``; returns what :meth:`load` takes."""
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError


def fingerprint(tokenizer: Tokenizer) -> str:
    """What ``tokenizer`` does, in 64 hexadecimal digits: equal for the same vocabulary in another file format.

    It is a hash of the end token and of the ids of a text, so that tokens added behind a vocabulary change nothing.
    """
    ids = tokenizer.encode(_FINGERPRINT_TEXT, eos=True)
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _find_file(path: Path) -> Path:
    """``path``, or the tokenizer's file in the folder ``path``. Raises :class:`ConfigError` where there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"data.tokenizer={path}: there is no such file or folder")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"data.tokenizer={path}: the folder holds neither tokenizer.json nor tokenizer.model")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Where the model has no end-of-sentence token it is refused: documents could not end."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise ConfigError(f"data.tokenizer={path}: not a sentencepiece model") from error
        if self._model.eos_id() < 0:
            raise ConfigError(f"data.tokenizer={path}: has no end-of-sentence token")
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id()
        unknown = self._model.unk_id()
        ids = {symbol: self._model.piece_to_id(symbol) for symbol in SYMBOLS}
        self.special_tokens = {symbol: index for symbol, index in ids.items() if index != unknown}

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(index) for index in ids])

    def save(self, folder: str | Path) -> Path:
        return Path(shutil.copyfile(self.path, Path(folder) / "tokenizer.model"))


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``; its begin and end tokens are named by ``tokenizer_config.json`` beside it."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ConfigError(f"data.tokenizer={path}: not a tokenizer of the tokenizers library") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_tokens = {token.content: index for index, token in self._added_tokens().items()}
        named = self._read_config()
        eos = self._find(named.get("eos_token"), (EOS, "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "</s>"))
        if eos is None:
            raise ConfigError(
                f"data.tokenizer={path}: no end token; tokenizer_config.json beside it must name eos_token"
            )
        self.eos_id = eos
        self.bos_id = self._find(named.get("bos_token"), (BOS, "<|begin_of_text|>", "<s>"))

    def _added_tokens(self) -> dict[int, Any]:
        return self._tokenizer.get_added_tokens_decoder()

    def _read_config(self) -> dict[str, Any]:
        config = self.path.with_name("tokenizer_config.json")
        if not config.is_file():
            return {}
        try:
            return json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"data.tokenizer={self.path}: {config} is not JSON") from error

    def _find(self, named: str | dict | None, usual: tuple[str, ...]) -> int | None:
        if isinstance(named, dict):
            named = named.get("content")
        for token in (named,) if named else usual:
            if (index := self._tokenizer.token_to_id(token)) is not None:
                return index
        return None

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        control = {self.bos_id, self.eos_id}
        kept = [int(index) for index in ids if int(index) not in control]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def save(self, folder: str | Path) -> Path:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if self.path.with_name(name).is_file():
                shutil.copyfile(self.path.with_name(name), Path(folder) / name)
        return Path(shutil.copyfile(self.path, Path(folder) / "tokenizer.json"))


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> None:
    """Train a byte-pair-encoding sentencepiece model on ``texts`` and write it to ``path``.

    Text comes back as it was (no normalisation, spaces kept, unknown characters as bytes), with one exception that is
    sentencepiece's: the character U+2581 comes back as a space. Digits are single tokens, as in DeepSeek-V3's
    predecessors, and :data:`SYMBOLS` are tokens. The same texts give the same bytes: one thread, nothing sampled.

    Raises :class:`ConfigError` where ``vocab_size`` is too small for the bytes and symbols or too large for the text.
    """
    import sentencepiece

    if vocab_size <= _SYMBOL_AND_BYTE_TOKENS:
        raise ConfigError(f"vocab_size={vocab_size}: must be more than the {_SYMBOL_AND_BYTE_TOKENS} bytes and symbols")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=list(SYMBOLS),
            bos_piece=BOS,
            eos_piece=EOS,
            max_sentence_length=4 * _LONGEST_PIECE + 4,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        # The library says it with the line of its source: "... Please set it to a value <= 281."
        largest = re.search(r"value <= (\d+)", str(error))
        if largest and int(largest[1]) > _SYMBOL_AND_BYTE_TOKENS:
            what_fits = f"the text is too small for it; must be at most {largest[1]}"
        else:
            what_fits = "the text is too small to train a tokenizer on; give more text, or a tokenizer that is there"
        raise ConfigError(f"vocab_size={vocab_size}: {what_fits}") from error
    Path(path).write_bytes(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_PIECE):
                yield line[start : start + _LONGEST_PIECE]
