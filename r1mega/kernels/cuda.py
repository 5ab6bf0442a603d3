"""The CUDA kernels of ``csrc/cuda`` (library ``r1mega/_cuda.so``): whether they are here, what they take, and calls.

They run where the library was built, ``R1MEGA_CUDA`` is not 0, the machine has a GPU, and the tensors of a call are
plain, on the GPU and of a type that the operation takes. The functions below are the bare kernels, without autograd and
without a check of shapes; ``r1mega.kernels.route``, ``scan`` and ``permute`` call them. They start work on the current
stream, never wait for it, and give the same bits in every run.

The library has plain C functions and knows neither Python nor torch: it is called through ctypes.
Shapes: T tokens, E experts, K choices a token, N tiles of 64 tokens, H hidden, R routed rows.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from r1mega.kernels.route import RouteOptions

LIBRARY = Path(__file__).resolve().parents[1] / "_cuda.so"
KERNELS = ("route", "route_backward", "rank", "scan", "permute")
INTERFACE = 2  # the library's functions and structures; csrc/cuda/kernels.cu has the same number
DEVICE = "cuda"
PLAIN = (Tensor, torch.nn.Parameter)
TILE_TOKENS, MAX_EXPERTS, MAX_TOP_K, MAX_GROUPS = 64, 384, 16, 32  # csrc/cuda/device.h has the same numbers
MAX_COPIES = 32  # of a row; csrc/cuda/permute.h
MAX_ROWS = 2**31 - 1


# Of an array whose type is not that of the others, which are float32 or, like rows, of any type.
DTYPES = dict.fromkeys(("experts", "ranks", "first_row", "row_of_choice", "counts"), torch.int64) | {
    "tile_counts": torch.int32
}


class _Arguments(Structure):
    """The C structure of the same fields. Tensors become pointers, None the null pointer.

    Raises ValueError for a tensor that its pointer would misrepresent: of other integers, or not dense. Only between
    rows of ``input`` there may be gaps: its structure says how far they are apart.
    """

    def __init__(self, **fields: object) -> None:
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        for name, tensor in tensors.items():
            wanted = DTYPES.get(name, tensor.dtype)
            dense = tensor.is_contiguous() if name != "input" else tensor.stride(-1) == 1 or tensor.shape[-1] < 2
            if tensor.dtype != wanted or not dense:
                raise ValueError(
                    f"{name}: must be dense and {wanted}; it has {tensor.dtype}, strides {tensor.stride()}"
                )
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        super().__init__(**fields | pointers)


class _Route(_Arguments):
    _fields_ = [
        ("logits", c_void_p), ("bias", c_void_p), ("num_tokens", c_int), ("num_experts", c_int), ("top_k", c_int),
        ("num_groups", c_int), ("top_k_groups", c_int), ("softmax", c_bool), ("normalize", c_bool),
        ("factor", c_float), ("experts", c_void_p), ("weights", c_void_p), ("ranks", c_void_p),
        ("tile_counts", c_void_p), ("tile_score_sums", c_void_p), ("chosen_scores", c_void_p),
    ]  # fmt: skip


class _RouteBackward(_Arguments):
    _fields_ = [
        ("grad_weights", c_void_p), ("chosen_scores", c_void_p), ("experts", c_void_p), ("logits", c_void_p),
        ("num_tokens", c_int), ("num_experts", c_int), ("top_k", c_int), ("softmax", c_bool), ("normalize", c_bool),
        ("factor", c_float), ("grad_logits", c_void_p),
    ]  # fmt: skip


class _Rank(_Arguments):
    _fields_ = [
        ("experts", c_void_p), ("num_tokens", c_int), ("num_experts", c_int), ("top_k", c_int), ("ranks", c_void_p),
        ("tile_counts", c_void_p),
    ]  # fmt: skip


class _Scan(_Arguments):
    _fields_ = [
        ("tile_counts", c_void_p), ("tile_score_sums", c_void_p), ("num_tiles", c_int), ("num_experts", c_int),
        ("first_row", c_void_p), ("counts", c_void_p), ("score_sums", c_void_p),
    ]  # fmt: skip


class _Permute(_Arguments):
    _fields_ = [
        ("input", c_void_p), ("experts", c_void_p), ("ranks", c_void_p), ("first_row", c_void_p),
        ("row_of_choice", c_void_p), ("rows", c_void_p), ("num_tokens", c_int), ("num_experts", c_int),
        ("top_k", c_int), ("tile_tokens", c_int), ("input_step", c_int64), ("row_bytes", c_int64),
    ]  # fmt: skip


def open_library(path: Path) -> ctypes.CDLL:
    """The library at ``path``. Raises OSError where it does not load or was built from other sources."""
    found = ctypes.CDLL(str(path))
    functions = [f"r1mega_{name}" for name in ("interface", "error", *KERNELS)]
    if not all(hasattr(found, name) for name in functions) or found.r1mega_interface() != INTERFACE:
        raise OSError("it was built from other sources")
    found.r1mega_error.restype = ctypes.c_char_p
    for name in KERNELS:
        getattr(found, f"r1mega_{name}").argtypes = [c_void_p, c_void_p]
    return found


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    if os.environ.get("R1MEGA_CUDA") == "0":
        return None, "R1MEGA_CUDA=0 is set"
    again = "make setup builds it where nvcc is found, as does python tools/build_cuda.py"
    if not LIBRARY.exists():
        return None, f"the CUDA library is not built; {again}"
    try:
        return open_library(LIBRARY), "the CUDA library is built"
    except OSError as error:
        return None, f"the CUDA library does not load ({error}); {again}"


library, reason = _load()


def takes(*tensors: Tensor | None) -> bool:
    """Whether all tensors are plain ones on the GPU, and the kernels are here; None stands for one that is left out."""
    if library is None or torch.compiler.is_compiling():
        return False
    return all(tensor is None or (type(tensor) in PLAIN and tensor.device.type == DEVICE) for tensor in tensors)


def takes_route(logits_TE: Tensor, bias_E: Tensor | None, options: RouteOptions) -> bool:
    """Whether :func:`route` runs for these: float32, and sizes that the kernels' tables have room for."""
    if not takes(logits_TE, bias_E) or logits_TE.dtype != torch.float32:
        return False
    num_tokens, num_experts = logits_TE.shape
    return (
        0 < options.top_k <= min(num_experts, MAX_TOP_K)
        and num_experts <= MAX_EXPERTS
        and 0 < options.num_groups <= MAX_GROUPS
        and num_experts % options.num_groups == 0
        and 0 < options.top_k_groups <= options.num_groups
        and num_tokens * options.top_k <= MAX_ROWS
    )


def takes_rows(input_TH: Tensor, choices_TK: Tensor) -> bool:
    """Whether :func:`permute` and :func:`copy_rows` run for these."""
    return takes(input_TH, choices_TK) and choices_TK.shape[1] <= MAX_COPIES


def route(
    logits_TE: Tensor, bias_E: Tensor | None, options: RouteOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose K experts for each token.

    Args:
        logits_TE: ``[T, E]`` float32, dense.
        bias_E: ``[E]`` float32, dense, or None.
        options: how.

    Returns:
        experts ``[T, K]`` int64, weights ``[T, K]`` float32, ranks inside the tile ``[T, K]`` int64, and of each tile
        counts ``[N, E]`` int32 and score sums ``[N, E]`` float32; last the chosen scores ``[T, K]`` float32, which
        :func:`route_backward` takes. N is at least 1.
    """
    num_tokens, num_experts = logits_TE.shape
    experts = logits_TE.new_empty((num_tokens, options.top_k), dtype=torch.int64)
    ranks = torch.empty_like(experts)
    weights = logits_TE.new_empty(experts.shape)
    chosen_scores = torch.empty_like(weights)
    tile_counts = _new_tiles(num_tokens, num_experts, torch.int32, logits_TE.device)
    tile_score_sums = _new_tiles(num_tokens, num_experts, torch.float32, logits_TE.device)
    arguments = _Route(
        logits=logits_TE, bias=bias_E, num_tokens=num_tokens, num_experts=num_experts, top_k=options.top_k,
        num_groups=options.num_groups, top_k_groups=options.top_k_groups,
        softmax=options.score_function == "softmax", normalize=options.normalize, factor=options.factor,
        experts=experts, weights=weights, ranks=ranks, tile_counts=tile_counts, tile_score_sums=tile_score_sums,
        chosen_scores=chosen_scores,
    )  # fmt: skip
    _call("route", arguments, logits_TE)
    return experts, weights, ranks, tile_counts, tile_score_sums, chosen_scores


def rank(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Rank choices that were made elsewhere; the experts of one token differ.

    Args:
        experts_TK: ``[T, K]`` int64, dense; E marks a dropped choice.
        num_experts: E, at most :data:`MAX_EXPERTS`.

    Returns:
        ranks inside the tile ``[T, K]`` int64 (0 for a dropped choice) and counts of each tile ``[N, E]`` int32.
    """
    num_tokens, top_k = experts_TK.shape
    ranks = torch.empty_like(experts_TK)
    tile_counts = _new_tiles(num_tokens, num_experts, torch.int32, experts_TK.device)
    arguments = _Rank(
        experts=experts_TK, num_tokens=num_tokens, num_experts=num_experts, top_k=top_k, ranks=ranks,
        tile_counts=tile_counts,
    )  # fmt: skip
    _call("rank", arguments, experts_TK)
    return ranks, tile_counts


def _new_tiles(num_tokens: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[N, E]`` to be filled; without tokens no kernel runs, and one tile has zeros."""
    make = torch.empty if num_tokens else torch.zeros
    return make(max(1, -(-num_tokens // TILE_TOKENS)), num_experts, dtype=dtype, device=device)


def scan(tile_counts_NE: Tensor, tile_score_sums_NE: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where the rows of each tile and expert begin.

    Args:
        tile_counts_NE: ``[N, E]`` int32, dense.
        tile_score_sums_NE: ``[N, E]`` float32, dense.

    Returns:
        first rows ``[N, E]`` int64, counts ``[E]`` int64, and the sum of the sums ``[E]`` (None without them).
    """
    num_tiles, num_experts = tile_counts_NE.shape
    first_row = tile_counts_NE.new_empty(tile_counts_NE.shape, dtype=torch.int64)
    counts = first_row.new_empty(num_experts)
    score_sums = None if tile_score_sums_NE is None else tile_score_sums_NE.new_empty(num_experts)
    arguments = _Scan(
        tile_counts=tile_counts_NE, tile_score_sums=tile_score_sums_NE, num_tiles=num_tiles, num_experts=num_experts,
        first_row=first_row, counts=counts, score_sums=score_sums,
    )  # fmt: skip
    _call("scan", arguments, tile_counts_NE)
    return first_row, counts, score_sums


def permute(
    input_TH: Tensor,
    experts_TK: Tensor,
    ranks_TK: Tensor,
    first_row_NE: Tensor,
    num_rows: int | None = None,
    padded_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Copy each token's row to ``first_row[tile, expert] + rank`` for each of its choices.

    Args:
        input_TH: ``[T, H]`` of any type, a row's numbers side by side; there may be gaps between rows.
        experts_TK: ``[T, K]`` int64, dense; E marks a dropped choice.
        ranks_TK: ``[T, K]`` int64, dense; inside the tile.
        first_row_NE: ``[N, E]`` int64, dense; of tiles of 64 tokens, or of one tile with all tokens.
        num_rows: R; by default T * K.
        padded_rows: whether some rows belong to no choice; they become zero.

    Returns:
        rows ``[R, H]``, and the row of each choice ``[T, K]`` int64, -1 where it was dropped.
    """
    num_tokens, top_k = experts_TK.shape
    num_tiles, num_experts = first_row_NE.shape
    assert num_tiles in (1, -(-num_tokens // TILE_TOKENS)), "first_row_NE has the tiles of other tokens"
    rows = _rows(input_TH, experts_TK.numel() if num_rows is None else num_rows, padded_rows)
    row_of_choice = torch.empty_like(experts_TK)
    arguments = _Permute(
        input=input_TH, experts=experts_TK, ranks=ranks_TK, first_row=first_row_NE, row_of_choice=row_of_choice,
        rows=rows, num_tokens=num_tokens, num_experts=num_experts, top_k=top_k,
        tile_tokens=TILE_TOKENS if num_tiles > 1 else max(num_tokens, 1), **_row_sizes(input_TH),
    )  # fmt: skip
    _call("permute", arguments, input_TH)
    return rows, row_of_choice


def copy_rows(input_TH: Tensor, row_of_choice_TK: Tensor, num_rows: int, padded_rows: bool = False) -> Tensor:
    """:func:`permute` where the row of each choice is known: ``[R, H]``; a negative row is left out."""
    num_tokens, top_k = row_of_choice_TK.shape
    rows = _rows(input_TH, num_rows, padded_rows)
    arguments = _Permute(
        input=input_TH, row_of_choice=row_of_choice_TK, rows=rows, num_tokens=num_tokens, top_k=top_k, tile_tokens=1,
        **_row_sizes(input_TH),
    )  # fmt: skip
    _call("permute", arguments, input_TH)
    return rows


def _row_sizes(input_TH: Tensor) -> dict[str, int]:
    """Bytes from one row of the input to the next, and of a row."""
    size = input_TH.element_size()
    return {"input_step": input_TH.stride(0) * size, "row_bytes": input_TH.shape[1] * size}


def _rows(input_TH: Tensor, num_rows: int, padded_rows: bool) -> Tensor:
    make = input_TH.new_zeros if padded_rows else input_TH.new_empty
    return make(num_rows, input_TH.shape[1])


def route_backward(
    grad_weights_TK: Tensor,
    experts_TK: Tensor,
    chosen_scores_TK: Tensor,
    num_experts: int,
    options: RouteOptions,
    logits_TE: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, ``[T, E]`` float32.

    Args:
        grad_weights_TK: ``[T, K]`` float32, dense.
        experts_TK: ``[T, K]`` int64, dense.
        chosen_scores_TK: ``[T, K]`` float32, dense.
        num_experts: E.
        options: those of the forward.
        logits_TE: ``[T, E]`` float32, dense; wanted where ``options.needs_logits``.
    """
    num_tokens, top_k = experts_TK.shape
    grad_logits = grad_weights_TK.new_empty(num_tokens, num_experts)
    arguments = _RouteBackward(
        grad_weights=grad_weights_TK, chosen_scores=chosen_scores_TK, experts=experts_TK,
        logits=logits_TE if options.needs_logits else None, num_tokens=num_tokens, num_experts=num_experts,
        top_k=top_k, softmax=options.score_function == "softmax", normalize=options.normalize, factor=options.factor,
        grad_logits=grad_logits,
    )  # fmt: skip
    _call("route_backward", arguments, grad_weights_TK)
    return grad_logits


def _call(name: str, arguments: _Arguments, tensor: Tensor) -> None:
    """Start a kernel on the current stream of the tensor's device."""
    assert library is not None
    with _device_of(tensor):
        error = getattr(library, f"r1mega_{name}")(ctypes.byref(arguments), _stream(tensor))
    if error:
        raise RuntimeError(f"the CUDA kernel {name} failed: {library.r1mega_error(error).decode()} ({error})")


def _device_of(tensor: Tensor) -> torch.cuda.device | nullcontext:
    current = tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(tensor.device)


def _stream(tensor: Tensor) -> int | None:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None
