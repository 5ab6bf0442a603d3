"""A tokenizer in Hugging Face's form: ``tokenizer.json`` and ``tokenizer_config.json``, which AutoTokenizer loads.

A sentencepiece BPE model becomes the same BPE of the ``tokenizers`` library. The two say it differently: sentencepiece
joins any two neighbours whose union is a piece, the best score first; ``tokenizers`` wants a list of joins, best first.
So each piece gives one join for each way to cut it in two pieces. They encode the same text to the same ids, with one
difference that is wanted: the text of a control token (begin, end) is that token here, as chat templates need it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_COPIED = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "chat_template.jinja")
_SPACE = "\u2581"  # sentencepiece's sign for a space

# Encoded with both tokenizers after every conversion.
PROBES = (
    "The quick brown fox, 1234567890.",
    "  two  and   three    spaces\n\n\ttab\r\n",
    "def f(x):\n        return x**2 # ===== ----------\n",
    "<think>\n2 + 2 = 4</think><answer>4</answer><think><think <unk> <0x41>",
    "naïve café — “ünïcödé” \u4f60\u597d\uff0c\u4e16\u754c \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467",
    " \u2581\u2581 \u0000\u0001\u00a0\u3000\ufeff",
)


def write_tokenizer(source: str, folder: Path, max_length: int) -> dict[str, int | None]:
    """Write the tokenizer ``source`` (``data.tokenizer``) into ``folder``.

    Args:
        source: a sentencepiece ``.model`` file, a ``tokenizer.json``, or a folder with one of them.
        folder: must exist.
        max_length: tokens that the model takes at most.

    Returns:
        ``bos_token_id``, ``eos_token_id``, ``pad_token_id``, None where there is none.

    Raises:
        ConfigError: the file is missing, or does what cannot be said in ``tokenizer.json``.
    """
    path = Path(source)
    if path.is_dir():
        path = path / TOKENIZER_FILE if (path / TOKENIZER_FILE).is_file() else path / "tokenizer.model"
    if not path.is_file():
        raise ConfigError(f"data.tokenizer={source}: there is no such file; the export needs the run's tokenizer")
    if path.suffix == ".json":
        for name in _COPIED:
            if path.with_name(name).is_file():
                shutil.copyfile(path.with_name(name), folder / name)
        return _ids_of_tokenizer_json(path)
    return _convert(path, folder, max_length)


def _ids_of_tokenizer_json(path: Path) -> dict[str, int | None]:
    from r1mega.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(path)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}


def _convert(path: Path, folder: Path, max_length: int) -> dict[str, int | None]:
    import sentencepiece
    import tokenizers

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise ConfigError(f"data.tokenizer={path}: not a sentencepiece model") from error
    converted = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(processor.serialized_model_proto(), str(path))))
    for probe in PROBES:
        ids = converted.encode(probe, add_special_tokens=False).ids
        if ids != processor.encode(probe) or converted.decode(ids) != processor.decode(ids):
            raise ConfigError(
                f"data.tokenizer={path}: tokenizer.json would encode {probe!r} in another way; not exported"
            )
    (folder / TOKENIZER_FILE).write_text(converted.to_str(pretty=True), encoding="utf-8")
    control = {name: getattr(processor, f"{name}_id")() for name in ("bos", "eos", "pad")}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{name}_token": processor.id_to_piece(index) for name, index in control.items() if index >= 0}
    text = json.dumps(config, indent=2, ensure_ascii=False) + os.linesep
    (folder / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")
    return {f"{name}_token_id": index if index >= 0 else None for name, index in control.items()}


def tokenizer_json(model: bytes, source: str) -> dict[str, Any]:
    """``tokenizer.json`` of a sentencepiece BPE model.

    Args:
        model: the contents of the ``.model`` file.
        source: what errors call it.

    Raises:
        ConfigError: the model does what is not converted (normalisation, a unigram model, ...).
    """
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto = messages.ModelProto.FromString(model)  # type: ignore[attr-defined]
    _check_convertible(proto, source)
    kind = messages.ModelProto.SentencePiece.Type  # type: ignore[attr-defined]
    pieces = list(enumerate(proto.pieces))
    unknown = next(piece.piece for piece in proto.pieces if piece.type == kind.UNKNOWN)
    joins = _joins({piece.piece: piece.score for piece in proto.pieces if piece.type == kind.NORMAL})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(index, piece.piece, special=piece.type == kind.CONTROL)
            for index, piece in pieces
            if piece.type in (kind.CONTROL, kind.USER_DEFINED)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in pieces},
            "merges": joins,
        },
    }


def _check_convertible(proto: Any, source: str) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    refused = {
        "is not a BPE model": trainer.model_type != trainer.BPE,
        "normalises its text": bool(normalizer.precompiled_charsmap),
        "adds a space in front (add_dummy_prefix)": normalizer.add_dummy_prefix,
        "removes spaces (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
        "keeps spaces as they are (escape_whitespaces)": not normalizer.escape_whitespaces,
        "has unused pieces": any(piece.type == piece.UNUSED for piece in proto.pieces),
    }
    for what, applies in refused.items():
        if applies:
            raise ConfigError(
                f"data.tokenizer={source}: {what}, which the export cannot convert; give a tokenizer.json instead"
            )


def _joins(scores: dict[str, float]) -> list[list[str]]:
    """All pairs of pieces whose union is a piece, the union with the best score first."""
    joins = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        joins += [[left, right] for left, right in cuts if left in scores and right in scores]
    return joins


def _added_token(index: int, piece: str, special: bool) -> dict[str, Any]:
    """A token that is found before any joining. A user's symbol is looked for in the normalised text, as there."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"id": index, "content": piece, **flags}
