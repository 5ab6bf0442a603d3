"""``corpus.json``: what a prepared folder says about itself, and whether the folder still is what it says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError
from r1mega.data.index import read_index
from r1mega.data.tokenizer import Tokenizer, fingerprint

RECORD = "corpus.json"
PARTS = ("train", "valid")
_KNOWN = ("arguments", "tokenizer", "vocab_size", "checksum", "train_tokens", "valid_tokens")


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """The sizes of files in ``folder``, in bytes, for the record."""
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in ``folder``; None where there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and all(name in record for name in _KNOWN) else None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a prepared folder: ``train.bin is missing``. None where every file is there in its size."""
    record = read_record(folder)
    if record is None:
        return f"{RECORD} {'cannot be read' if (folder / RECORD).exists() else 'is missing'}"
    parts = [part for part in PARTS if record[f"{part}_tokens"]]
    names = [f"{part}.{suffix}" for part in parts for suffix in ("bin", "idx")] + [record["tokenizer"]]
    for name, size in {**dict.fromkeys(names), **record.get("files", {})}.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if size is not None and (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes, not {size}"
    try:
        for part in parts:
            read_index(str(folder / part), "data")
    except ConfigError as error:
        return str(error).partition(": ")[2]
    return None


def advice(path: str) -> str:
    """What to do about a damaged file or prefix in a folder that r1mega has prepared: ``; delete ...``, or nothing."""
    folder = Path(path).parent
    if not (folder / RECORD).exists():
        return ""
    return f"; {folder} was made by tools/prepare_data.py: delete it and prepare it again"


def maker_of(prefix: str) -> tuple[Path, int, str] | None:
    """The tokenizer that ``prefix`` was encoded with: file, size and fingerprint. None where nothing tells."""
    folder = Path(prefix).parent
    record = read_record(folder) if Path(prefix).name in PARTS else None
    if record is None:
        return None
    file = folder / record["tokenizer"]
    if "tokenizer_fingerprint" in record:
        return file, record["vocab_size"], record["tokenizer_fingerprint"]
    try:
        return file, record["vocab_size"], fingerprint(Tokenizer.load(file))
    except ConfigError:
        return None
