"""Packs a tuple of tensors into bytes behind a header that says what they are, so that shapes may change at any time.

The header is ``HEADER_WORDS`` int64 numbers: how many tensors, then for each its type, whether it requires a gradient,
how many dimensions, and these. The bytes of each tensor start at a multiple of ``ALIGNMENT``.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

HEADER_WORDS = 64
HEADER_BYTES = 8 * HEADER_WORDS
_WORDS = struct.Struct(f"={HEADER_WORDS}q")
ALIGNMENT = 16

# The position in this list travels in the header: only ever append.
DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128,
]  # fmt: skip


class Spec(NamedTuple):
    """What a receiver must know of a tensor before it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Specs = tuple[Spec, ...]


@functools.lru_cache(maxsize=1024)
def encode_header(specs: Specs) -> Tensor:
    """:func:`header_bytes` as ``[HEADER_BYTES] uint8``. Callers must not write to it: it is kept for the next call."""
    return torch.frombuffer(bytearray(header_bytes(specs)), dtype=torch.uint8)


@functools.lru_cache(maxsize=1024)
def header_bytes(specs: Specs) -> bytes:
    """The header.

    Raises ValueError where a type cannot travel, or where the tensors have too many dimensions for one header.
    """
    words = [len(specs)]
    for spec in specs:
        if spec.dtype not in DTYPES:
            raise ValueError(f"a pipeline stage cannot hand over tensors of type {spec.dtype}")
        words += [DTYPES.index(spec.dtype), int(spec.requires_grad), len(spec.shape), *spec.shape]
    if len(words) > HEADER_WORDS:
        raise ValueError(f"{len(specs)} tensors are too many for one pipeline message: stack some of them")
    return _WORDS.pack(*words, *[0] * (HEADER_WORDS - len(words)))


def decode_header(header: Tensor) -> Specs:
    """The inverse of :func:`encode_header`."""
    return decode_bytes(header.numpy().tobytes())  # a bytes object is a key that costs little


@functools.lru_cache(maxsize=1024)
def decode_bytes(header: bytes) -> Specs:
    """The inverse of :func:`header_bytes`."""
    words = iter(_WORDS.unpack(header))
    specs = []
    for _ in range(next(words)):
        dtype, requires_grad, dims = next(words), next(words), next(words)
        specs.append(Spec(tuple(next(words) for _ in range(dims)), DTYPES[dtype], bool(requires_grad)))
    return tuple(specs)


@functools.lru_cache(maxsize=1024)
def layout(specs: Specs) -> tuple[list[int], int]:
    """Where each tensor starts, in bytes, and the length of all."""
    offsets, total = [], 0
    for spec in specs:
        offsets.append(total)
        total += -(-spec.num_bytes // ALIGNMENT) * ALIGNMENT
    return offsets, total


def pack(tensors: tuple[Tensor, ...], specs: Specs, header: Tensor | None = None, length: int = 0) -> Tensor:
    """The bytes of the tensors, uint8, laid out as :func:`layout` says; a copy.

    Args:
        tensors: what is packed.
        specs: of the tensors.
        header: bytes to put in front.
        length: of the result behind the header, at least.
    """
    parts = [] if header is None else [header]
    for tensor, spec in zip(tensors, specs, strict=True):
        parts.append(tensor.detach().reshape(-1).view(torch.uint8))
        if spec.num_bytes % ALIGNMENT:
            parts.append(_padding(-spec.num_bytes % ALIGNMENT, tensor.device))
    missing = length - layout(specs)[1]
    if missing > 0:
        parts.append(_padding(missing, parts[0].device))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _padding(num_bytes: int, device: torch.device) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def unpack(payload: Tensor, specs: Specs) -> tuple[Tensor, ...]:
    """The tensors, as views of ``payload`` (uint8) and leaves of a new graph."""
    return tuple(
        _view(payload, offset, spec).requires_grad_(spec.requires_grad)
        for spec, offset in zip(specs, layout(specs)[0], strict=True)
    )


def _view(payload: Tensor, offset: int, spec: Spec) -> Tensor:
    return payload[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
