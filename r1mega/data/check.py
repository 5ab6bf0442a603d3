"""Every file that a run will read, checked before any process group is made."""

from __future__ import annotations

import os
from pathlib import Path

from r1mega.config import Config, ConfigError
from r1mega.data.demonstrations import are_demonstrations, read_examples
from r1mega.data.index import IndexFile, cache_folder, checksum, parse_blend, read_index
from r1mega.data.record import advice
from r1mega.data.tokenizer import Tokenizer
from r1mega.data.tokenizer_check import check_maker, check_tokenizer, tokenizer_of

_SCAN_TOKENS = 1 << 28
_SCAN_WINDOWS = 64
_MOST_EPOCHS = 10_000  # the order of each is made before the run begins


def check_data(config: Config, contents: bool = True) -> None:
    """Check the files that ``config.data`` names; imports no torch.

    Args:
        config: the job.
        contents: also compare the checksum, encode demonstrations, and look for token ids that the model does not have:
            in whole files up to 268 million tokens, in 64 places of larger ones. One process of a machine needs to do
            it.

    Raises :class:`ConfigError`: one line that names the field and the file.
    """
    data = config.data
    if not data.train:
        raise ConfigError("data.train=[]: name at least one prefix of .bin/.idx files; see tools/prepare_data.py")
    tokenizer = check_tokenizer(config)
    names = {"data.train": data.train, "data.valid": data.valid}
    prefixes = {name: [prefix for prefix, _ in parse_blend(blend, name)] for name, blend in names.items()}
    folder = cache_folder(prefixes["data.train"], data.cache_dir)
    for name, blend in names.items():
        if are_demonstrations(blend, name):
            _check_demonstrations(config, prefixes[name], tokenizer, folder if contents else None, name)
        elif blend:
            _check_documents(config, prefixes[name], tokenizer, contents, name)
    if contents and data.checksum is not None and (found := checksum(prefixes["data.train"])) != data.checksum:
        files = ", ".join(prefixes["data.train"])
        hint = next(filter(None, map(advice, prefixes["data.train"])), "")
        raise ConfigError(f"data.checksum={data.checksum}: the files of data.train ({files}) have {found}{hint}")
    _check_cache_folder(folder)


def _check_documents(
    config: Config, prefixes: list[str], tokenizer: Tokenizer | None, contents: bool, name: str
) -> None:
    num_samples = 0
    for prefix in prefixes:
        try:
            index = read_index(prefix, name)
        except ConfigError as error:
            raise ConfigError(f"{error}{advice(prefix)}") from error
        if (expected := tokenizer or tokenizer_of(config.model.checkpoint)) is not None:
            check_maker(prefix, expected, "data.tokenizer" if tokenizer else "model.checkpoint", name)
        num_samples += (index.num_tokens - 1) // config.data.sequence_length
        if (size := index.num_tokens) <= config.data.sequence_length:
            raise ConfigError(
                f"data.sequence_length={config.data.sequence_length}: {prefix}.bin ({name}) has only {size} tokens"
            )
        if contents:
            _check_tokens(index, config, tokenizer, name)
    _check_epochs(config, name, num_samples)


def _check_demonstrations(
    config: Config, paths: list[str], tokenizer: Tokenizer | None, folder: Path | None, name: str
) -> None:
    """Without ``folder``, where they are encoded, only look for the files."""
    if tokenizer is None:
        raise ConfigError(f"data.tokenizer=null: must be given, because {name} holds demonstrations ({paths[0]})")
    for path in paths:
        if not Path(path).is_file():
            raise ConfigError(f"{name}={path}: there is no such file")
    if folder is None:
        return
    _check_cache_folder(folder)
    try:
        files = [read_examples(path, tokenizer, folder, name) for path in paths]
    except OSError as error:
        raise ConfigError(f"data.cache_dir={folder}: cannot be used ({error.strerror}); name another folder") from error
    for examples in files:
        examples.check_lengths(config.data.sequence_length)
    _check_epochs(config, name, sum(map(len, files)))


def _check_epochs(config: Config, name: str, num_samples: int) -> None:
    """A slip of a few zeros must not fill the disk with sample orders."""
    setting = "num_steps" if name == "data.train" else "valid_batches"
    steps, most = getattr(config.train, setting), _MOST_EPOCHS * num_samples // config.train.global_batch_size
    if steps > most:
        raise ConfigError(
            f"train.{setting}={steps}: must be at most {most}, which is {_MOST_EPOCHS:,} times through {name}"
        )


def _check_tokens(index: IndexFile, config: Config, tokenizer: Tokenizer | None, name: str) -> None:
    """Every token id must be one of the tokenizer's, which are no more than the model's."""
    limit = config.model.vocab_size if tokenizer is None else tokenizer.vocab_size
    tokens = index.tokens()
    window = len(tokens) if len(tokens) <= _SCAN_TOKENS else _SCAN_TOKENS // _SCAN_WINDOWS
    for start in range(0, len(tokens), max(window, len(tokens) // _SCAN_WINDOWS)):
        part = tokens[start : start + window]
        for token in (int(part.min()), int(part.max())):
            if 0 <= token < limit:
                continue
            found = f"{index.prefix}.bin ({name}) holds token id {token}"
            if tokenizer is None:
                raise ConfigError(
                    f"model.vocab_size={limit}: {found}; must be more, or was it made with another tokenizer?"
                )
            raise ConfigError(
                f"data.tokenizer={config.data.tokenizer}: has {limit} tokens, but {found}; "
                "name the tokenizer that it was made with"
            )


def _check_cache_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data.cache_dir={folder}: cannot be made ({error.strerror}); name another folder") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"data.cache_dir={folder}: cannot be written; name another folder")
