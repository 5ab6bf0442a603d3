"""From a corpus to Megatron's ``.bin/.idx`` files and a tokenizer: one folder, whole or not at all."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from r1mega.config import ConfigError, require
from r1mega.data.corpus import Corpus
from r1mega.data.files import whole_folder
from r1mega.data.index import checksum
from r1mega.data.megatron import quiet_import
from r1mega.data.record import PARTS, RECORD, describe_files, find_damage, read_record
from r1mega.data.tokenizer import Tokenizer, fingerprint, train_tokenizer

_TOKENIZER_TEXT = 50_000_000  # characters that a tokenizer is trained on at most; 30 s
_SECONDS_BETWEEN_REPORTS = 2.0


@dataclass(frozen=True)
class Prepared:
    """What is in a prepared folder. ``train``, ``valid`` and ``tokenizer`` are values for the settings ``data.*``."""

    folder: Path
    train: str
    valid: str | None
    tokenizer: str
    vocab_size: int
    checksum: str
    train_tokens: int
    valid_tokens: int
    is_new: bool


def prepare(
    corpus: Corpus,
    output: str | Path,
    tokenizer: str | Path | None = None,
    vocab_size: int = 4096,
    valid_every: int = 50,
    report: Callable[[str], None] = print,
    rebuild_damaged: bool = False,
) -> Prepared:
    """Encode ``corpus`` into ``output/train.{bin,idx}`` and ``output/valid.{bin,idx}``, with end tokens.

    Where ``output`` holds the result of the same arguments, nothing is done. The folder appears under its name only
    when everything in it is complete.

    Args:
        corpus: the documents.
        output: the folder to make.
        tokenizer: an existing tokenizer, which is copied; None trains one on the corpus.
        vocab_size: size of a tokenizer to train.
        valid_every: one document in so many is held out for validation (a corpus of fewer documents gives the end of
            each document instead); 0 holds out none.
        report: takes lines of progress.
        rebuild_damaged: make a folder anew in which files are missing or cut short, where it holds nothing but what
            this function makes; for a corpus that can be had again.

    Raises:
        ConfigError: an input cannot be read, or ``output`` holds something else, is damaged or cannot be written.
    """
    require(valid_every == 0 or valid_every > 1, "valid_every", valid_every, "must be 0 or more than 1")
    output = Path(output)
    arguments = {
        "corpus": corpus.identity(),
        "tokenizer": str(Path(tokenizer).resolve()) if tokenizer is not None else {"vocab_size": vocab_size},
        "valid_every": valid_every,
    }
    if rebuild_damaged:
        _clear_damaged(output, arguments, report)
    try:
        with whole_folder(output) as folder:
            if folder is not None:
                record = {"arguments": arguments, **_fill(folder, corpus, tokenizer, vocab_size, valid_every, report)}
                (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except BrokenPipeError:  # of the progress, not of a file
        raise
    except OSError as error:
        raise _file_error(error, output) from error
    return _read_prepared(output, arguments, is_new=folder is not None)


def _file_error(error: OSError, output: Path) -> ConfigError:
    """What the file system said, as one line that names the setting; a full disk names no file."""
    partial = output.parent / f".{output.name}.partial"
    if error.filename is None or partial.is_relative_to(error.filename) or partial in Path(error.filename).parents:
        return ConfigError(f"output={output}: cannot be written ({error.strerror}); name another folder")
    return ConfigError(f"input={error.filename}: cannot be read ({error.strerror})")


def _clear_damaged(output: Path, arguments: dict, report: Callable[[str], None]) -> None:
    """Move away a damaged folder of these arguments; of several processes one does it."""
    try:
        descriptor = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return  # not there: nothing to clear; or no folder, which is found later
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not output.exists() or not os.path.samestat(os.fstat(descriptor), os.stat(output)):
            return  # another process has moved it away
        damage, record = find_damage(output), read_record(output)
        if damage is None or (record is not None and record["arguments"] != arguments) or not _is_own(output):
            return
        report(f"{output} is damaged ({damage}): making it again")
        aside = output.with_name(f".{output.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(output, aside)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(descriptor)


def _is_own(output: Path) -> bool:
    """Whether a folder looks like one of ours: something is there that we make, and nothing else."""
    found = {path.name for path in output.iterdir()} - {"cache"}
    made = {f"{part}.{suffix}" for part in PARTS for suffix in ("bin", "idx")} | {RECORD, "tokenizer.model"}
    return bool(found) and found <= made


def _read_prepared(output: Path, arguments: dict, is_new: bool) -> Prepared:
    record, damage = read_record(output), find_damage(output)
    if record is None:
        raise ConfigError(
            f"output={output}: is there already, and is damaged or not made by this command ({damage}); "
            "name another folder, or delete this one"
        )
    different = [name for name, value in arguments.items() if record["arguments"].get(name) != value]
    if different:
        raise ConfigError(
            f"output={output}: was made with another {' and '.join(different)}; name another folder, or delete this one"
        )
    if damage is not None:
        raise ConfigError(f"output={output}: is damaged ({damage}); delete it and run the same command again")
    valid = str(output / "valid") if record["valid_tokens"] else None
    names = ("vocab_size", "checksum", "train_tokens", "valid_tokens")
    values = {name: record[name] for name in names}
    return Prepared(output, str(output / "train"), valid, str(output / record["tokenizer"]), **values, is_new=is_new)


def _fill(
    folder: Path,
    corpus: Corpus,
    tokenizer: str | Path | None,
    vocab_size: int,
    valid_every: int,
    report: Callable[[str], None],
) -> dict:
    """Write everything into ``folder``; returns what the record says about it."""
    if tokenizer is None:
        report("reading the corpus")
        texts = _sample(corpus)
        if not any(text.strip() for text in texts):
            raise ConfigError("input: holds no text")
        size = sum(map(len, texts)) / 1e6
        report(f"training a tokenizer of {vocab_size} tokens on {size:.1f} MB (up to half a minute)")
        train_tokenizer(texts, vocab_size, folder / "tokenizer.model")
        del texts
        saved = folder / "tokenizer.model"
    else:
        saved = Tokenizer.load(tokenizer).save(folder)
    loaded = Tokenizer.load(saved)
    counts = _encode(folder, loaded, _split(corpus, valid_every), corpus, report)
    if valid_every and not counts["valid"]:
        counts = _encode(folder, loaded, _split_ends(corpus, valid_every), corpus, report)
    if not counts["train"]:
        raise ConfigError("input: holds no text")
    return {
        "tokenizer": saved.name,
        "vocab_size": loaded.vocab_size,
        "tokenizer_fingerprint": fingerprint(loaded),
        "files": describe_files(folder, (path.name for path in folder.iterdir() if not path.name.startswith("."))),
        "checksum": checksum([str(folder / "train")]),
        "train_tokens": counts["train"],
        "valid_tokens": counts["valid"],
    }


def _sample(corpus: Corpus) -> list[str]:
    """Documents for the tokenizer: all, or every n-th where that is too much."""
    corpus_iterator = iter(corpus)
    first = list(itertools.islice(corpus_iterator, 1))  # a corpus may learn its size when it is first read
    stride = max(1, -(-corpus.num_bytes // _TOKENIZER_TEXT))
    texts, room = [], _TOKENIZER_TEXT
    for text in itertools.islice(itertools.chain(first, corpus_iterator), 0, None, stride):
        texts.append(text[:room])
        room -= len(texts[-1])
        if room <= 0:
            break
    return texts


def _split(corpus: Corpus, valid_every: int) -> Iterator[tuple[str, str]]:
    """``(part, document)`` with every ``valid_every``-th document in part "valid"."""
    for number, text in enumerate((text for text in corpus if text.strip()), start=1):
        yield ("valid" if valid_every and number % valid_every == 0 else "train"), text


def _split_ends(corpus: Corpus, valid_every: int) -> Iterator[tuple[str, str]]:
    """For a corpus of few documents: the end of each, from the start of a line, is in part "valid"."""
    for text in (text for text in corpus if text.strip()):
        middle = len(text) - len(text) // valid_every
        cut = text.rfind("\n", 0, middle) + 1 or middle
        yield "train", text[:cut]
        if cut < len(text):
            yield "valid", text[cut:]


def _encode(
    folder: Path,
    tokenizer: Tokenizer,
    documents: Iterable[tuple[str, str]],
    corpus: Corpus,
    report: Callable[[str], None],
) -> dict[str, int]:
    """Write the documents of each part; returns the tokens of each part. A part without tokens leaves no file."""
    with quiet_import():
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    counts = {"train": 0, "valid": 0}
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = {part: IndexedDatasetBuilder(str(folder / f"{part}.bin"), dtype=dtype) for part in counts}
    start = last = time.monotonic()
    with ExitStack() as files:
        for builder in builders.values():
            files.enter_context(builder.data_file)  # megatron-core closes it only where nothing goes wrong
        for part, text in documents:
            ids = tokenizer.encode(text, eos=True)
            builders[part].add_document(ids, [len(ids)])
            counts[part] += len(ids)
            if (now := time.monotonic()) - last > _SECONDS_BETWEEN_REPORTS:
                last, done = now, corpus.bytes_read / max(1, corpus.num_bytes)
                left = (now - start) * (1 - done) / done
                report(f"encoding: {done:4.0%}, {sum(counts.values()):,} tokens, {left:.0f} s left")
    for part, builder in builders.items():
        builder.finalize(str(folder / f"{part}.idx"))
        if not counts[part]:
            for suffix in (".bin", ".idx"):
                (folder / f"{part}{suffix}").unlink()
    return counts
