"""Whether ``data.tokenizer`` is the one that the model and the data were made for. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from r1mega.config import Config, ConfigError
from r1mega.data.record import advice, maker_of
from r1mega.data.tokenizer import Tokenizer, fingerprint

# Rows that a model may have beyond its tokenizer: Megatron pads a vocabulary to a multiple of 128 x tp, published
# models leave room to add tokens (DeepSeek-V2: 2.4 %).
MOST_PADDING, MOST_PADDING_SHARE = 1024, 0.05


def check_tokenizer(config: Config) -> Tokenizer | None:
    """Load ``data.tokenizer`` and compare it with the model; None where there is none.

    The tokenizer may not be larger than the model, nor smaller by more than padding explains. A checkpoint that has its
    own tokenizer decides instead of the size: the two must encode alike.

    Raises :class:`ConfigError`: one line with the numbers that do not fit.
    """
    if config.data.tokenizer is None:
        return None
    try:
        tokenizer = Tokenizer.load(config.data.tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{error}{advice(config.data.tokenizer)}") from error
    size, rows, name = tokenizer.vocab_size, config.model.vocab_size, config.data.tokenizer
    if size > rows:
        raise ConfigError(f"model.vocab_size={rows}: must be at least {size}, the size of data.tokenizer ({name})")
    if name == config.model.checkpoint:
        return tokenizer
    own = tokenizer_of(config.model.checkpoint)
    if own is not None:
        if fingerprint(own) != fingerprint(tokenizer):
            raise ConfigError(
                f"data.tokenizer={name}: has {size} tokens and is another than {own.path} ({own.vocab_size} tokens), "
                "the checkpoint's own; name that one"
            )
        return tokenizer
    most = size + max(MOST_PADDING, int(MOST_PADDING_SHARE * size))
    if rows > most:
        raise ConfigError(
            f"model.vocab_size={rows}: data.tokenizer ({name}) has only {size} tokens; must be {size} to {most}, "
            "or the tokenizer another"
        )
    return tokenizer


def check_maker(prefix: str, tokenizer: Tokenizer, field: str, name: str) -> None:
    """Refuse a tokenizer that is not the one which r1mega made ``prefix`` with, where its folder tells.

    Args:
        prefix: of the ``.bin/.idx`` files.
        tokenizer: to compare.
        field: the setting that the tokenizer comes from.
        name: the setting that the files come from.
    """
    maker = maker_of(prefix)
    if maker is None:
        return
    file, size, made_with = maker
    if fingerprint(tokenizer) != made_with:
        raise ConfigError(
            f"{field}={tokenizer.path}: has {tokenizer.vocab_size} tokens and is another tokenizer than the one that "
            f"{prefix}.bin ({name}) was made with ({size} tokens): {file}"
        )


def tokenizer_of(checkpoint: str | None) -> Tokenizer | None:
    """The tokenizer in the folder of ``model.checkpoint``; None where there is none that can be read."""
    names = ("tokenizer.json", "tokenizer.model")
    if checkpoint is None or not any((Path(checkpoint) / name).is_file() for name in names):
        return None
    try:
        return Tokenizer.load(checkpoint)
    except ConfigError:
        return None
