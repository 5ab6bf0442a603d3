"""Matrix products: the C++ kernel equals PyTorch's library for all shapes, strides and groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1mega.kernels import native, products
from r1mega.kernels.linear import grouped_linear

DTYPES = [(torch.float32, 2e-5), (torch.float64, 1e-13)]
# rows, columns, depth: around the sizes of tiles, vectors and pieces of the depth, and none of something
SIZES = [
    (1, 1, 1), (5, 63, 7), (6, 64, 16), (7, 65, 17), (13, 16, 512), (12, 130, 513), (64, 96, 1100), (100, 31, 40),
    (0, 8, 8), (8, 0, 8), (8, 8, 0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def only_the_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel multiplies, also what PyTorch would be faster at, and PyTorch's own products are out of reach."""
    if native.library is None or native.library.level() != "avx512":
        pytest.skip("this machine has no vectors of 64 bytes, or the extension was not built")
    if "falls_back" in request.keywords:
        return
    monkeypatch.setattr(products, "native_multiplies", lambda: True)
    monkeypatch.setattr(products, "FEWEST_ROWS", 0)
    monkeypatch.setattr(products, "LEAST_WORK", 0)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layouts(matrix: Tensor) -> list[Tensor]:
    """The same matrix with rows side by side, with columns, and as a part of a larger one."""
    rows, cols = matrix.shape
    wider = matrix.new_full((rows + 2, cols + 3), torch.nan)
    wider[1 : rows + 1, 2 : cols + 2] = matrix
    return [matrix, matrix.t().contiguous().t(), wider[1 : rows + 1, 2 : cols + 2]]


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_product_equals_pytorch_s_whatever_the_strides(size, dtype, tolerance):
    rows, cols, depth = size
    left, right = random(rows, depth, dtype=dtype), random(depth, cols, dtype=dtype, seed=1)
    expected, close = left @ right, {"rtol": tolerance, "atol": tolerance * max(depth, 1) ** 0.5}
    for a in layouts(left):
        for b in layouts(right):
            torch.testing.assert_close(products.matmul(a, b), expected, **close)
            for out in layouts(torch.full_like(expected, 3.0))[::2]:
                around = out._base.clone() if out._base is not None else None
                assert products.add_matmul(out, a, b) is out
                torch.testing.assert_close(out, expected + 3, **close)
                assert products.matmul(a, b, out=out) is out
                torch.testing.assert_close(out, expected, **close)
                if around is not None:
                    outside = around.isnan()
                    assert torch.equal(outside, out._base.isnan()), "something beside the result was written"


@pytest.mark.parametrize("counts", [[3, 0, 70, 5], [0, 0, 0, 0], [1, 1, 1, 1], [130, 2, 0, 9]], ids=str)
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_products_of_groups_equal_one_product_a_group(counts, dtype, tolerance):
    total, x, y = sum(counts), 40, 72
    rows, weights = random(total + 3, x, dtype=dtype), random(4, y, x, dtype=dtype, seed=1)
    gradient = random(total + 3, y, dtype=dtype, seed=2)
    close = {"rtol": tolerance, "atol": tolerance * 20}
    for of_group in (weights.transpose(1, 2), weights.transpose(1, 2).contiguous()):
        parts = [part @ of_group[e] for e, part in enumerate(rows[:total].split(counts))]
        actual = products.group_matmul(rows, of_group, counts)
        assert actual.shape == (total + 3, y)
        torch.testing.assert_close(actual[:total], torch.cat(parts), **close)
    pairs = zip(gradient[:total].split(counts), rows[:total].split(counts), strict=True)
    expected = torch.stack([grad.t() @ part for grad, part in pairs])
    out = torch.full_like(weights, torch.nan)
    products.group_outer(gradient, rows, counts, out, add=False)
    torch.testing.assert_close(out, expected, **close)
    products.group_outer(gradient, rows, counts, out, add=True)
    torch.testing.assert_close(out, 2 * expected, **close)


def test_a_row_has_the_same_bits_however_many_rows_and_threads_there_are():
    left, right = random(700, 300, dtype=torch.float32), random(300, 1000, dtype=torch.float32, seed=1)
    whole = products.matmul(left, right)
    for rows in (1, 5, 64, 699):
        assert torch.equal(products.matmul(left[:rows], right), whole[:rows])
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(products.matmul(left, right), whole)
            counts = [100, 0, 350, 250]
            of_groups = products.group_matmul(left, right.expand(4, -1, -1), counts)
            assert torch.equal(of_groups, whole)
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinity_go_where_the_formula_takes_them():
    left, right = torch.ones(9, 20), torch.ones(20, 33)
    left[4, 3], right[7, 32] = torch.nan, torch.inf
    result = products.matmul(left, right)
    assert result[4].isnan().all() and result[0, 32] == torch.inf
    assert result[[0, 1, 2, 3, 5, 6, 7, 8], :32].isfinite().all()


def test_a_grouped_linear_s_gradients_come_from_the_kernel(monkeypatch):
    def no_library(*_, **__):
        raise AssertionError("PyTorch's library multiplied")

    x, weight, counts = random(30, 24), random(3, 2, 8, 24, seed=1), [20, 0, 10]
    inputs = [tensor.requires_grad_() for tensor in (x, weight)]
    upstream = random(30, 16, seed=2)
    flat = weight.detach().flatten(1, 2)
    expected = torch.cat([part @ flat[e].t() for e, part in enumerate(x.detach().split(counts))])
    monkeypatch.setattr(torch, "mm", no_library)
    out = grouped_linear(*inputs, counts)
    of_x, of_weight = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(out, expected)
    by_group = list(zip(upstream.split(counts), x.detach().split(counts), strict=True))
    torch.testing.assert_close(of_x, torch.cat([grad @ flat[e] for e, (grad, _) in enumerate(by_group)]))
    torch.testing.assert_close(of_weight.flatten(1, 2), torch.stack([grad.t() @ part for grad, part in by_group]))


@pytest.mark.falls_back
def test_other_types_small_products_and_narrow_vectors_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(native, "call", lambda *_: pytest.fail("the kernel multiplied"))
    large = torch.ones(64, 64)
    assert products.matmul(large.bfloat16(), large.bfloat16())[0, 0] == 64
    assert products.matmul(torch.ones(2, 3), torch.ones(3, 2))[0, 0] == 3
    monkeypatch.setattr(products, "native_multiplies", lambda: False)
    assert products.matmul(large, large)[0, 0] == products.add_matmul(large * 0, large, large)[0, 0] == 64
    assert products.group_matmul(large, large[None], [64])[0, 0] == 64


@pytest.mark.falls_back
@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_levels_without_wide_vectors_say_that_they_do_not_multiply(name):
    best = native.library.level()
    try:
        native.library.set_level(name)
        assert not native.library.multiplies()
        assert products.matmul(torch.ones(64, 64), torch.ones(64, 64))[0, 0] == 64
        with pytest.raises(RuntimeError, match=f"{name} code has no products"):
            products._one(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), add=False)
    finally:
        native.library.set_level(best)
