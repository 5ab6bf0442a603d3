"""Tensors as bytes behind a header."""

from __future__ import annotations

import pytest
import torch

from r1mega.pipeline.packing import HEADER_BYTES, Spec, decode_header, encode_header, layout, pack, unpack


def test_any_tuple_of_tensors_survives() -> None:
    torch.manual_seed(0)
    tensors = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.tensor(7),
        torch.zeros(0, 4),
        torch.randn(4, 6).t(),
        torch.tensor([True, False, True]),
        torch.randn(5).to(torch.bfloat16).requires_grad_(),
    )
    specs = tuple(Spec.of(tensor) for tensor in tensors)
    total = layout(specs)[1]
    assert pack(tensors, specs).numel() == pack(tensors, specs, length=total - 1).numel() == total
    message = pack(tensors, specs, encode_header(specs), length=total + 9)
    assert message.numel() == HEADER_BYTES + total + 9
    header, payload = message[:HEADER_BYTES], message[HEADER_BYTES:]
    assert decode_header(header) == specs
    for before, after in zip(tensors, unpack(payload, specs), strict=True):
        assert torch.equal(before, after)
        assert before.dtype == after.dtype
        assert before.requires_grad == after.requires_grad
        assert after.is_leaf


def test_no_tensor_at_all_survives() -> None:
    assert decode_header(encode_header(())) == ()
    assert pack((), ()).numel() == 0


def test_more_tensors_than_a_header_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="20 tensors are too many for one pipeline message"):
        encode_header((Spec((1,), torch.float32, False),) * 20)


def test_a_type_that_cannot_travel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot hand over tensors of type torch.uint16"):
        encode_header((Spec((1,), torch.uint16, False),))
