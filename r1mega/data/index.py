"""Megatron's ``.bin/.idx`` files, as far as they can be checked without megatron-core, and the blend of a config.

A ``.idx`` file is: ``MMIDIDX\\0\\0``, version 1 (uint64), type of a token (uint8), sequences n (uint64), documents + 1
(uint64), lengths (n int32), byte offsets (n int64), document boundaries (int64), and modes (n int8) if multimodal.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy

from r1mega.config import ConfigError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


@dataclass(frozen=True)
class IndexFile:
    """What the ``.idx`` file of ``prefix`` says. ``lengths``: tokens of each sequence, ``[n]`` int32, memory-mapped."""

    prefix: str
    token_type: numpy.dtype
    lengths: numpy.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=numpy.int64))

    def tokens(self) -> numpy.ndarray:
        """All tokens of the ``.bin`` file, memory-mapped."""
        return numpy.memmap(f"{self.prefix}.bin", dtype=self.token_type, mode="r")


def parse_blend(blend: list[str], name: str) -> list[tuple[str, float | None]]:
    """``["0.7", "a", "0.3", "b"]`` or ``["a", "b"]`` as ``(prefix, weight)`` pairs; no weight is None.

    Raises :class:`ConfigError` naming the field ``name`` where weights are missing for some or not positive.
    """
    words = [str(word).strip() for word in blend]
    weights = [_number(word) for word in words]
    if not any(weight is not None for weight in weights):
        return [(word, None) for word in words]
    is_weight = [weight is not None for weight in weights]
    if len(words) % 2 or is_weight != [True, False] * (len(words) // 2):
        raise ConfigError(f"{name}={words}: either every prefix follows its weight, or none does")
    for word, weight in zip(words[1::2], weights[0::2], strict=True):
        if weight is None or not 0 < weight < float("inf"):
            raise ConfigError(f"{name}={words}: the weight of {word} must be positive")
    return list(zip(words[1::2], weights[0::2], strict=True))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def read_index(prefix: str, name: str) -> IndexFile:
    """Read ``prefix.idx`` and compare it with the size of ``prefix.bin``.

    Raises :class:`ConfigError` naming the field ``name`` and the file that is missing, damaged or cut short.
    """
    try:
        return _read_index(prefix, name)
    except OSError as error:
        raise ConfigError(f"{name}={prefix}: {error.filename or prefix} cannot be read: {error.strerror}") from error


def _read_index(prefix: str, name: str) -> IndexFile:
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            hint = "; give the prefix, without .bin or .idx" if prefix.endswith((".bin", ".idx")) else ""
            raise ConfigError(f"{name}={prefix}: there is no file {path}{hint}")
    with open(idx_path, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ConfigError(f"{name}={prefix}: {idx_path} is cut short ({len(header)} bytes)")
    magic, version, type_code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if magic != _MAGIC or version != 1:
        raise ConfigError(f"{name}={prefix}: {idx_path} is not a Megatron index (version 1)")
    if type_code not in _TOKEN_TYPES:
        raise ConfigError(f"{name}={prefix}: {idx_path} holds no token ids (type code {type_code})")
    token_type, size = numpy.dtype(_TOKEN_TYPES[type_code]), idx_path.stat().st_size
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if size not in (expected, expected + num_sequences):
        what = "cut short" if size < expected else "longer than its header says"
        raise ConfigError(f"{name}={prefix}: {idx_path} is {what} ({size} bytes, not {expected})")
    if num_sequences == 0:
        raise ConfigError(f"{name}={prefix}: {idx_path} holds no documents")
    lengths = numpy.memmap(idx_path, numpy.int32, "r", _HEADER.size, (num_sequences,))
    offsets = numpy.memmap(idx_path, numpy.uint8, "r", _HEADER.size + 4 * num_sequences, (8 * num_sequences,))
    expected = int(offsets[-8:].view(numpy.int64)[0]) + int(lengths[-1]) * token_type.itemsize
    if bin_path.stat().st_size != expected:
        actual = bin_path.stat().st_size
        what = "cut short" if actual < expected else "longer than its index says"
        raise ConfigError(f"{name}={prefix}: {bin_path} is {what} ({actual} bytes, {idx_path} says {expected})")
    index = IndexFile(prefix, token_type, lengths)
    if int(lengths.min()) < 0 or index.num_tokens * token_type.itemsize != expected:
        raise ConfigError(f"{name}={prefix}: {idx_path} is damaged: its lengths do not add up to {bin_path}")
    return index


def cache_folder(prefixes: list[str], cache_dir: str | None) -> Path:
    """Where the sample order is kept: ``cache_dir``, or ``cache`` beside the first data file."""
    return Path(cache_dir) if cache_dir is not None else Path(prefixes[0]).parent / "cache"


def checksum(prefixes: list[str]) -> str:
    """sha256 over the bytes of ``prefix.bin`` and ``prefix.idx`` of each prefix, in order: ``data.checksum``.

    A prefix that ends in ``.jsonl`` is a file.
    """
    digest = hashlib.sha256()
    for prefix in prefixes:
        for suffix in ("",) if prefix.endswith(".jsonl") else (".bin", ".idx"):
            with open(f"{prefix}{suffix}", "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
