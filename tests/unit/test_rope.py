"""Rotary embedding: the rotation itself; its frequencies are held to transformers in tests/peers."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from r1mega.config import RopeConfig
from r1mega.model.rope import RotaryTable, rotate


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
