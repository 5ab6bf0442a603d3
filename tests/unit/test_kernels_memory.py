"""Memory that large results use again: never while a tensor still refers to it, and not without bound."""

from __future__ import annotations

import pytest
import torch

from r1mega.kernels import native
from r1mega.kernels.combine import combine
from r1mega.kernels.permute import permute
from r1mega.kernels.route import rank_choices

pytestmark = pytest.mark.needs_extension
LARGE = native.REUSED_BYTES // 4
MOST_WAITING = 1 << 29


@pytest.fixture(autouse=True)
def nothing_waits():
    if native.library is not None:
        native.library.release_waiting()
        assert native.library.waiting_bytes() == 0
    yield
    if native.library is not None:
        native.library.release_waiting()


def large(scale: int = 1) -> torch.Tensor:
    return native.empty((scale * LARGE,), torch.empty(0))


def test_memory_is_used_again_once_nothing_refers_to_it_and_not_before() -> None:
    first, second = large(), large()
    assert first.data_ptr() != second.data_ptr()
    address, view = first.data_ptr(), first[5:].view(1, -1)
    del first
    assert large().data_ptr() != address
    view.fill_(3.0)
    del view
    kept = [large() for _ in range(3)]
    assert address in {tensor.data_ptr() for tensor in kept}


def test_a_much_smaller_tensor_does_not_take_a_large_block() -> None:
    address = large(8).data_ptr()
    assert large().data_ptr() != address
    assert large(8).data_ptr() == address


def test_what_waits_is_bounded() -> None:
    tensors = [large(16) for _ in range(6)]
    del tensors
    assert 0 < native.library.waiting_bytes() <= MOST_WAITING


def test_small_results_come_from_pytorch_s_own_allocator() -> None:
    small = native.empty((4, 4), torch.empty(0))
    del small
    assert native.library.waiting_bytes() == 0


def test_results_that_are_alive_keep_their_values_while_others_are_made() -> None:
    experts = torch.arange(8).repeat(1024, 1)
    x = torch.arange(1024.0).unsqueeze(1).repeat(1, LARGE // 8192).requires_grad_()
    decided = experts, *rank_choices(experts, 8)
    weights = torch.ones(1024, 8)
    results = [permute(x * factor, weights, *decided) for factor in (1.0, 2.0, 3.0)]
    for factor, (rows, _, row_map) in zip((1.0, 2.0, 3.0), results, strict=True):
        assert torch.equal(rows, (x * factor).repeat(8, 1))
        assert torch.equal(combine(rows, row_map), x * factor * 8)
    gradients = [torch.autograd.grad(rows.square().sum(), x)[0] for rows, _, _ in results]
    for factor, gradient in zip((1.0, 2.0, 3.0), gradients, strict=True):
        torch.testing.assert_close(gradient, 16 * factor**2 * x)
