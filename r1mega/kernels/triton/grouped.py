"""Products of each expert's rows with its weight, where only the GPU knows how many rows an expert has.

Rows stand sorted by expert; ``ends_E`` is the row after the last one of each expert (int32, on the device). The rows
are cut into tiles of at most :data:`TILE_ROWS` rows of one expert, listed by :func:`find_tiles` on the device, so that
nothing waits for the host. There are at most ``R // TILE_ROWS + E`` of them, and that many are started: programs for
tiles that do not exist return at once.

:func:`gate_up_swiglu` computes gate and up projection of a tile in one program, and SwiGLU and the router's weight on
their sums before they leave the registers. For plain products PyTorch's ``grouped_mm`` is the better call where it has
a kernel (:func:`library_multiplies`); elsewhere it reads the ends on the host and multiplies expert by expert, and
:func:`matmul` and :func:`outer` take its place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from r1mega.kernels.triton import LIBRARY_CAPABILITIES
from r1mega.kernels.triton.compat import capability, cast, dot, launch, padded, pieces, shared_memory, silu

TILE_ROWS = 128
TILES_AT_ONCE = 32
INNER_BYTES = 128  # of a row that is loaded at a time: what a swizzled block of shared memory holds
SPARE_BYTES = 1024


def library_multiplies(rows_RX: Tensor, width: int) -> bool:
    """Whether PyTorch's ``grouped_mm`` has a kernel for ``[R, X]`` times ``[E, X, width]``.

    Else it reads the ends on the host (torch 2.13, ``aten/src/ATen/native/cuda/GroupedBlas.cpp``).
    """
    aligned = rows_RX.shape[1] % 8 == 0 and width % 8 == 0
    return rows_RX.dtype == torch.bfloat16 and aligned and capability(rows_RX.device)[0] in LIBRARY_CAPABILITIES


def find_tiles(ends_E: Tensor, num_rows: int) -> Tensor:
    """The tiles of sorted rows.

    Args:
        ends_E: ``[E]`` int32.
        num_rows: R, at least the last of ``ends_E``.

    Returns:
        ``[3, N]`` int32: each tile's expert (-1 for a tile that does not exist), its first row, and its expert's end.
    """
    num_experts = ends_E.shape[0]
    tiles = ends_E.new_empty(3, num_rows // TILE_ROWS + min(num_experts, num_rows))
    if tiles.shape[1]:
        arguments = ends_E, tiles, tiles.shape[1], num_experts, padded(num_experts), TILE_ROWS, TILES_AT_ONCE
        launch(_find_tiles, (pieces(tiles.shape[1], TILES_AT_ONCE),), arguments, num_warps=4)
    return tiles


@triton.jit
def _find_tiles(
    ends_E, tiles_3N, num_tiles, num_experts, WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, AT_ONCE: tl.constexpr
):
    expert = tl.arange(0, WIDTH)
    real = expert < num_experts
    end = tl.load(ends_E + expert, mask=real, other=0)
    first = tl.load(ends_E + expert - 1, mask=real & (expert > 0), other=0)
    own_tiles = (tl.maximum(end - first, 0) + TILE_ROWS - 1) // TILE_ROWS
    tiles_end = tl.cumsum(own_tiles, 0)
    first_tile = tiles_end - own_tiles
    tile = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    mine = (first_tile[None, :] <= tile[:, None]) & (tile[:, None] < tiles_end[None, :])
    owner = tl.sum(tl.where(mine, expert[None, :] + 1, 0), 1) - 1
    row = tl.sum(tl.where(mine, first[None, :] + (tile[:, None] - first_tile[None, :]) * TILE_ROWS, 0), 1)
    last = tl.sum(tl.where(mine, tl.broadcast_to(end[None, :], mine.shape), 0), 1)
    inside = tile < num_tiles
    tl.store(tiles_3N + tile, owner, mask=inside)
    tl.store(tiles_3N + num_tiles + tile, row, mask=inside)
    tl.store(tiles_3N + 2 * num_tiles + tile, last, mask=inside)


def gate_up_swiglu(
    rows_RH: Tensor, weights_E2FH: Tensor, scale_R: Tensor | None, ends_E: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``silu(rows @ gate[e].T) * (rows @ up[e].T) * scale[:, None]``; rows after the last expert's are left undefined.

    Args:
        rows_RH: ``[R, H]``, contiguous.
        weights_E2FH: ``[E, 2, F, H]``, contiguous: gate and up of each expert.
        scale_R: ``[R]``, contiguous: the router's weight of each row; None stands for 1.
        ends_E: ``[E]`` int32.
        keep: whether to return the two products as well.

    Returns:
        ``[R, F]``; and gate and up side by side, ``[R, 2 F]``, or None.
    """
    columns = weights_E2FH.shape[2]
    out = rows_RH.new_empty(rows_RH.shape[0], columns)
    gate_up = rows_RH.new_empty(rows_RH.shape[0], 2 * columns) if keep else None
    _multiply(rows_RH, weights_E2FH.transpose(2, 3), ends_E, out, True, gate_up, scale_R)
    return out, gate_up


def matmul(rows_RX: Tensor, weights_EXY: Tensor, ends_E: Tensor) -> Tensor:
    """``rows @ weights[e]``, ``[R, Y]``; rows after the last expert's are left undefined.

    Args:
        rows_RX: ``[R, X]``, contiguous.
        weights_EXY: ``[E, X, Y]`` of any strides.
        ends_E: ``[E]`` int32.
    """
    out = rows_RX.new_empty(rows_RX.shape[0], weights_EXY.shape[2])
    _multiply(rows_RX, weights_EXY.unsqueeze(1), ends_E, out, False)
    return out


def _multiply(
    rows_RX: Tensor, weights_EPXY: Tensor, ends_E: Tensor, out_RY: Tensor, gated: bool,
    gate_up: Tensor | None = None, scale_R: Tensor | None = None,
) -> None:  # fmt: skip
    (num_rows, inner_size), columns = rows_RX.shape, out_RY.shape[1]
    if out_RY.numel() == 0 or ends_E.shape[0] == 0:
        return
    tiles = find_tiles(ends_E, num_rows)
    inner = INNER_BYTES // rows_RX.element_size()
    block = _columns(rows_RX, gated)
    with_descriptors = _with_descriptors(rows_RX, weights_EPXY)
    rows, weights = (rows_RX, weights_EPXY)
    if with_descriptors:
        rows = TensorDescriptor.from_tensor(rows_RX, [TILE_ROWS, inner])
        weights = TensorDescriptor.from_tensor(weights_EPXY.transpose(2, 3).flatten(0, 2), [block, inner])
    arguments = (
        rows, weights, scale_R, tiles, out_RY, gate_up, tiles.shape[1], inner_size, columns, *weights_EPXY.stride(),
        gated, with_descriptors, TILE_ROWS, block, inner,
    )  # fmt: skip
    launch(
        _grouped_matmul,
        (pieces(columns, block), tiles.shape[1]),
        arguments,
        num_warps=8,
        num_stages=_stages(rows_RX, (TILE_ROWS + (1 + gated) * block) * inner),
    )


def _columns(rows_RX: Tensor, gated: bool) -> int:
    """Of a program: as many as its sums leave registers for. Float32 products do not use the tensor cores."""
    if rows_RX.element_size() != 2:
        return 16 if gated else 32
    return 64 if gated and capability(rows_RX.device) < (9, 0) else 128


def _stages(tensor: Tensor, elements: int) -> int:
    """Loads in flight: as many as fit into shared memory, up to four."""
    available = shared_memory(tensor.device) - SPARE_BYTES
    return max(2, min(4, available // (elements * tensor.element_size())))


def _with_descriptors(rows_RX: Tensor, weights_EPXY: Tensor) -> bool:
    """Whether the tensor memory accelerator loads the factors: it wants rows of whole 16 bytes."""
    if capability(rows_RX.device) < (9, 0) or rows_RX.element_size() != 2:
        return False
    straight = weights_EPXY.transpose(2, 3)
    aligned = all(t.data_ptr() % 16 == 0 for t in (rows_RX, straight))
    return straight.is_contiguous() and rows_RX.shape[1] % 8 == 0 and aligned


@triton.jit
def _grouped_matmul(
    rows_RX, weights_EPXY, scale_R, tiles_3N, out_RY, gate_up, num_tiles, inner_size, columns,
    stride_expert, stride_part, stride_inner, stride_column,
    GATED: tl.constexpr, DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    # Programs that run at a time share an expert: those of all its columns come before its next tile.
    first_column = tl.program_id(0) * COLUMNS
    tile = tl.program_id(1)
    expert = tl.load(tiles_3N + tile)
    if expert < 0:
        return
    first_row = tl.load(tiles_3N + num_tiles + tile)
    end = tl.load(tiles_3N + 2 * num_tiles + tile)
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    up_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIPTORS:
        weight_row = expert * (1 + GATED) * columns + first_column
        for start in range(0, inner_size, INNER):
            x = rows_RX.load([first_row, start])
            sums = dot(x, weights_EPXY.load([weight_row, start]).T, sums)
            if GATED:
                up_sums = dot(x, weights_EPXY.load([weight_row + columns, start]).T, up_sums)
    else:
        x_places = rows_RX + row[:, None].to(tl.int64) * inner_size + k[None, :]
        weight_places = weights_EPXY + expert.to(tl.int64) * stride_expert
        weight_places += k[:, None].to(tl.int64) * stride_inner + column[None, :].to(tl.int64) * stride_column
        for start in range(0, inner_size, INNER):
            inside = k < inner_size - start
            x = tl.load(x_places, mask=(row < end)[:, None] & inside[None, :], other=0.0)
            weight_inside = inside[:, None] & (column < columns)[None, :]
            sums = dot(x, tl.load(weight_places, mask=weight_inside, other=0.0), sums)
            if GATED:
                up_sums = dot(x, tl.load(weight_places + stride_part, mask=weight_inside, other=0.0), up_sums)
            x_places += INNER
            weight_places += INNER * stride_inner
    inside = (row < end)[:, None] & (column < columns)[None, :]
    long_row = row[:, None].to(tl.int64)
    if GATED:
        if gate_up is not None:
            places = gate_up + long_row * (2 * columns) + column[None, :]
            tl.store(places, cast(sums, gate_up.dtype.element_ty), mask=inside)
            tl.store(places + columns, cast(up_sums, gate_up.dtype.element_ty), mask=inside)
        sums = silu(sums) * up_sums
        if scale_R is not None:
            sums = sums * tl.load(scale_R + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
    tl.store(out_RY + long_row * columns + column[None, :], cast(sums, out_RY.dtype.element_ty), mask=inside)


def outer(left_RX: Tensor, right_RY: Tensor, ends_E: Tensor, add_to: Tensor | None = None) -> Tensor:
    """``left[rows of e].T @ right[rows of e]``, ``[E, X, Y]``: the gradient of a grouped weight.

    Args:
        left_RX: ``[R, X]``, contiguous.
        right_RY: ``[R, Y]``, contiguous.
        ends_E: ``[E]`` int32.
        add_to: ``[E, X, Y]``, contiguous: what the products are added to, inside the kernel; it is returned.
    """
    num_experts, shape = ends_E.shape[0], (left_RX.shape[1], right_RY.shape[1])
    out = left_RX.new_empty(num_experts, *shape) if add_to is None else add_to
    if out.numel() == 0:
        return out
    block = 128 if left_RX.element_size() == 2 else 32
    inner = INNER_BYTES // left_RX.element_size()
    arguments = left_RX, right_RY, ends_E, out, *shape, add_to is not None, block, block, inner
    launch(
        _grouped_outer,
        (pieces(shape[1], block), pieces(shape[0], block), num_experts),
        arguments,
        num_warps=8 if block == 128 else 4,
        num_stages=_stages(left_RX, 2 * block * inner),
    )
    return out


@triton.jit
def _grouped_outer(
    left_RX, right_RY, ends_E, out_EXY, width_x, width_y,
    ADD: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(0) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    first = tl.load(ends_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_E + expert)
    sums = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    row = first + tl.arange(0, INNER)
    left_places = left_RX + row[None, :].to(tl.int64) * width_x + x[:, None]
    right_places = right_RY + row[:, None].to(tl.int64) * width_y + y[None, :]
    for start in range(first, end, INNER):
        inside = start + tl.arange(0, INNER) < end
        left = tl.load(left_places, mask=inside[None, :] & (x < width_x)[:, None], other=0.0)
        right = tl.load(right_places, mask=inside[:, None] & (y < width_y)[None, :], other=0.0)
        sums = dot(left, right, sums)
        left_places += INNER * width_x
        right_places += INNER * width_y
    inside = (x < width_x)[:, None] & (y < width_y)[None, :]
    places = out_EXY + expert.to(tl.int64) * width_x * width_y + x[:, None].to(tl.int64) * width_y + y[None, :]
    if ADD:
        sums += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, cast(sums, out_EXY.dtype.element_ty), mask=inside)
