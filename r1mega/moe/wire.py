"""What one row of a message holds: a token's row, its router weights and its experts, byte for byte.

On the wire a row is in the type of the model, or in bfloat16, or in float8 (e4m3) with a float32 scale for each block
of 128 elements, as DeepSeek-V3 sends it (arXiv 2412.19437, section 3.3); weights and experts always travel bit by bit.
A row of a message is copied and sent as numbers of the model's type, or of float32, that nobody looks at.
Shapes: T rows, H hidden, K experts a token, W elements of a row of a message.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

WIRES = ("model", "bfloat16", "float8")
BLOCK = 128  # elements that share a scale
LARGEST = torch.finfo(torch.float8_e4m3fn).max
ALIGNMENT = 16  # bytes, the largest pieces that rows are copied in, where all of them begin there
ID = torch.int32


def encode(rows_TH: Tensor, wire: str) -> Tensor:
    """Rows as bytes, ``[T, bytes]``; ``wire`` is ``model``, ``bfloat16`` or ``float8``."""
    if wire == "float8":
        return _to_float8(rows_TH)
    return _bytes(rows_TH.to(torch.bfloat16) if wire == "bfloat16" else rows_TH)


def decode(encoded: Tensor, width: int, dtype: torch.dtype, wire: str) -> Tensor:
    """The rows ``[T, width]`` that :func:`encode` was given, to the precision of the wire."""
    if wire == "float8":
        return _from_float8(encoded, width).to(dtype)
    return _typed(encoded, torch.bfloat16 if wire == "bfloat16" else dtype).to(dtype)


def encoded_bytes(width: int, dtype: torch.dtype, wire: str) -> int:
    """Bytes of one encoded row."""
    if wire == "float8":
        return width + 4 * -(-width // BLOCK)
    return width * (2 if wire == "bfloat16" else dtype.itemsize)


@dataclass
class RowFormat:
    """The messages of one layer.

    Args:
        width: H.
        top_k: K.
        dtype: of the rows.
        weight_dtype: of the weights.
        wire: how rows travel towards the experts; back they go as bfloat16 where this is not ``model``.
    """

    width: int
    top_k: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    wire: str = "model"

    @property
    def wire_back(self) -> str:
        return "model" if self.wire == "model" else "bfloat16"

    def pack_rows(self, rows_TH: Tensor, wire: str) -> Tensor:
        """Rows alone, ``[T, W]``."""
        return rows_TH if wire == "model" else _joined([encode(rows_TH, wire)], self.carrier, ALIGNMENT)

    def unpack_rows(self, message_NW: Tensor, wire: str) -> Tensor:
        """What :meth:`pack_rows` was given, ``[N, H]``."""
        if wire == "model":
            return message_NW
        end = encoded_bytes(self.width, self.dtype, wire)
        return decode(message_NW.view(torch.uint8)[:, :end], self.width, self.dtype, wire)

    def pack(self, rows_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """``[T, W]``. Experts are counted from 1 there, so that a row of zeros goes to no expert."""
        parts = [encode(rows_TH, self.wire), _bytes(weights_TK), _bytes((experts_TK + 1).to(ID))]
        return _joined(parts, self.carrier, ALIGNMENT)

    def unpack(self, message_NW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, weights ``[N, K]`` and experts counted from 1 ``[N, K]``.

        On the wire ``model`` the rows are a view into the message, with gaps between them.
        """
        packed = message_NW.view(torch.uint8)
        rows_end = encoded_bytes(self.width, self.dtype, self.wire)
        weights_end = rows_end + self.top_k * self.weight_dtype.itemsize
        if self.wire == "model":
            rows = message_NW.view(self.dtype)[:, : self.width]
        else:
            rows = decode(packed[:, :rows_end], self.width, self.dtype, self.wire)
        weights = _typed(packed[:, rows_end:weights_end], self.weight_dtype)
        return rows, weights, _typed(packed[:, weights_end : weights_end + self.top_k * ID.itemsize], ID)

    @property
    def carrier(self) -> torch.dtype:
        """The type of the numbers that a message is copied as."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def adds_up(self) -> bool:
        """Whether messages with gradients can be added as they are."""
        return self.wire == "model" and self.dtype == self.weight_dtype

    def pack_gradients(self, rows_NH: Tensor, weights_NK: Tensor, wire: str) -> Tensor:
        """Gradients of rows and of weights in one message."""
        if self.adds_up:
            return torch.cat([rows_NH, weights_NK], dim=1)
        return _joined([encode(rows_NH, wire), _bytes(weights_NK)], self.carrier)

    def unpack_gradients(self, message: Tensor, wire: str) -> tuple[Tensor, Tensor]:
        """What :meth:`pack_gradients` was given; of a message that :attr:`adds_up`, two views."""
        if self.adds_up:
            return message[..., : self.width], message[..., self.width :]
        message, end = message.view(torch.uint8), encoded_bytes(self.width, self.dtype, wire)
        rows = decode(message[..., :end].flatten(0, -2), self.width, self.dtype, wire)
        weights = _typed(message[..., end:], self.weight_dtype)
        return rows.view(*message.shape[:-1], self.width), weights


def _joined(parts: list[Tensor], carrier: torch.dtype, alignment: int = 1) -> Tensor:
    """Bytes side by side, as numbers of type ``carrier`` where their count allows it, else as bytes.

    Every kernel can copy the numbers, and a GPU copies them faster than bytes.
    """
    padding = -sum(part.shape[1] for part in parts) % alignment
    if padding:
        parts.append(parts[0].new_zeros(parts[0].shape[0], padding))
    size = carrier.itemsize
    if all(part.shape[1] % size == 0 and part.storage_offset() % size == 0 for part in parts):
        return torch.cat([part.view(carrier) for part in parts], dim=1)
    joined = torch.cat(parts, dim=1)
    return joined.view(carrier) if joined.shape[1] % size == 0 else joined


def _bytes(rows: Tensor) -> Tensor:
    if rows.numel() == 0:  # which may have strides that a view refuses
        return torch.empty(rows.shape[0], rows.shape[1] * rows.element_size(), dtype=torch.uint8, device=rows.device)
    return rows.contiguous().view(torch.uint8)


def _typed(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; a copy only where some would begin at an address that the type cannot have."""
    places = (packed.storage_offset(), *packed.stride()[:-1], packed.shape[-1])
    if packed.stride(-1) != 1 or any(place % dtype.itemsize for place in places):
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(dtype)


def _to_float8(rows_TH: Tensor) -> Tensor:
    num_rows, width = rows_TH.shape
    blocks = F.pad(rows_TH.float(), (0, -width % BLOCK)).view(num_rows, -(-width // BLOCK), BLOCK)
    scales = blocks.abs().amax(dim=-1).clamp_(min=1e-30) / LARGEST
    values = (blocks / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return torch.cat([values.flatten(1).view(torch.uint8)[:, :width], _bytes(scales)], dim=1)


def _from_float8(encoded: Tensor, width: int) -> Tensor:
    values = _typed(encoded[:, :width], torch.float8_e4m3fn).float()
    scales = _typed(encoded[:, width:], torch.float32)
    return values * scales.repeat_interleave(BLOCK, dim=1)[:, :width]
