"""Operations on tensors that have a shape and no numbers: results and gradients have the right shapes and types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from r1mega.kernels.combine import combine
from r1mega.kernels.fake import is_fake
from r1mega.kernels.grouped_swiglu import grouped_swiglu
from r1mega.kernels.linear import grouped_linear
from r1mega.kernels.permute import RowMap
from r1mega.kernels.rms_norm import rms_norm
from r1mega.kernels.swiglu import swiglu, weighted_swiglu

BF16 = torch.bfloat16


@pytest.fixture(params=["meta", "fake"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are made; under the fake mode those of the CPU have no numbers."""
    with FakeTensorMode() if request.param == "fake" else nullcontext():
        yield "meta" if request.param == "meta" else "cpu"


def check(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor) -> None:
    assert is_fake(out) and out.shape == shape and out.dtype == dtype
    for given, gradient in zip(inputs, torch.autograd.grad(out, inputs, torch.empty_like(out)), strict=True):
        assert is_fake(gradient) and gradient.shape == given.shape and gradient.dtype == given.dtype


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_shapes_and_types_are_known_without_numbers(device: str, dtype: torch.dtype) -> None:
    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, requires_grad=dtype.is_floating_point)

    rows, weights = made(14, 6), made(5, 3, dtype=torch.float32)
    row_map = RowMap(made(5, 3, dtype=torch.int64), 14, dropped=True, padded=True)
    check(combine(rows, row_map), (5, 6), dtype, rows)
    check(combine(rows, row_map, weights), (5, 6), dtype, rows, weights)
    gate, up, both, scale = made(4, 8), made(4, 8), made(14, 16), made(14, dtype=torch.float32)
    check(swiglu(gate, up), (4, 8), dtype, gate, up)
    check(weighted_swiglu(both, scale), (14, 8), dtype, both, scale)
    gain = made(6)
    check(rms_norm(rows, gain, 1e-6), (14, 6), dtype, rows, gain)
    gate_up, down = made(3, 2, 8, 6), made(3, 6, 8)
    for counts in ([4, 0, 10], made(3, dtype=torch.int64)):
        check(grouped_linear(rows, gate_up, counts), (14, 16), dtype, rows, gate_up)
        hidden = grouped_swiglu(rows, gate_up, scale, counts)
        check(grouped_linear(hidden, down, counts), (14, 6), dtype, rows, gate_up, scale, down)
