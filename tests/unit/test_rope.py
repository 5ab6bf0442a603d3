"""Rotary embedding: the rotation itself; its frequencies are held to transformers in tests/peers."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from r1mega.config import RopeConfig
from r1mega.kernels import native
from r1mega.kernels.rotate import reference_turn, rotate
from r1mega.model.rope import RotaryTable


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_pair_turns_by_its_angle_and_the_result_is_in_halves(interleaved):
    cos, sin = RotaryTable(RopeConfig(), 6)(5, torch.float64, torch.device("cpu"))
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    pairs = x.unflatten(-1, (3, 2)) if interleaved else x.unflatten(-1, (2, 3)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin).unsqueeze(1)
    actual = rotate(x, cos, sin, interleaved)
    torch.testing.assert_close(actual, torch.cat([turned.real, turned.imag], dim=-1))
    assert gradcheck(lambda x: rotate(x, cos, sin, interleaved), (x,))


def test_a_longer_table_begins_with_the_shorter_one():
    table = RotaryTable(RopeConfig(scaling="yarn", factor=4.0, original_max_position=64, mscale_all_dim=1.0), 8)
    short = table(3, torch.float32, torch.device("cpu"))
    for one, two in zip(short, table(9, torch.float32, torch.device("cpu")), strict=True):
        torch.testing.assert_close(one, two[:3], rtol=0, atol=0)


@pytest.mark.skipif(native.library is None, reason=native.reason)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_kernel_equals_the_reference_for_dense_inputs_and_for_parts_of_wider_ones(dtype, interleaved):
    generator = torch.Generator().manual_seed(0)
    for batch, length, heads, dim in ((2, 5, 3, 6), (1, 7, 1, 64), (3, 1, 2, 2), (0, 4, 2, 8)):
        cos, sin = (torch.randn(length, dim // 2, generator=generator, dtype=dtype) for _ in range(2))
        wide = torch.randn(batch, length, heads, dim + 4, generator=generator, dtype=dtype)
        for x in (
            wide[..., 4:],
            wide[..., 4:].contiguous(),
            wide[..., :dim].transpose(0, 1).contiguous().transpose(0, 1),
        ):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = rotate(leaf, cos, sin, interleaved)
            expected = reference_turn(x, cos, sin, interleaved, False, back=False)
            torch.testing.assert_close(out, expected)
            grad = torch.randn(out.shape, generator=generator, dtype=dtype)
            out.backward(grad)
            torch.testing.assert_close(leaf.grad, reference_turn(grad, cos, sin, False, interleaved, back=True))
            assert rotate(x, cos, sin, interleaved).equal(out)
