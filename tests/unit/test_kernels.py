"""Every operation equals plain PyTorch, forward and backward, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from r1mega.kernels import native
from r1mega.kernels.attention import causal_attention
from r1mega.kernels.combine import combine
from r1mega.kernels.grouped_swiglu import grouped_swiglu
from r1mega.kernels.linear import grouped_linear, linear, linears
from r1mega.kernels.permute import permute
from r1mega.kernels.rms_norm import rms_norm
from r1mega.kernels.route import RouteOptions, rank_choices, route
from r1mega.kernels.swiglu import swiglu, weighted_swiglu
from r1mega.pipeline.weight_gradient import WeightGradientStore


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def test_linear_equals_torch_and_passes_gradcheck():
    x, w = random(5, 3), random(4, 3)
    torch.testing.assert_close(linear(x, w), F.linear(x, w))
    assert gradcheck(lambda x, w: linear(x, w), (x, w))


def test_grouped_linear_is_a_product_an_expert_with_empty_experts_allowed():
    x, w, counts = random(6, 3), random(4, 2, 3), [2, 0, 4, 0]
    expected = torch.cat([F.linear(rows, w[e]) for e, rows in enumerate(x.split(counts))])
    torch.testing.assert_close(grouped_linear(x, w, counts), expected)
    torch.testing.assert_close(grouped_linear(x, w, torch.tensor(counts)), expected)
    assert gradcheck(lambda x, w: grouped_linear(x, w, counts), (x, w))
    nothing = torch.autograd.grad(grouped_linear(x[:0], w, [0] * 4).sum(), (x, w))
    assert all((gradient == 0).all() for gradient in nothing)


def test_several_products_of_one_input_equal_them_one_by_one():
    x, weights = random(6, 3), (random(4, 3), random(2, 3))
    for actual, weight in zip(linears(x, weights), weights, strict=True):
        torch.testing.assert_close(actual, F.linear(x, weight))
    assert gradcheck(lambda x, *weights: linears(x, weights), (x, *weights))


def test_a_grouped_weight_of_two_parts_gives_their_products_side_by_side():
    x, both, counts = random(6, 3), random(2, 2, 4, 3), [2, 4]
    expected = torch.cat([grouped_linear(x, both[:, part], counts) for part in range(2)], dim=1)
    torch.testing.assert_close(grouped_linear(x, both, counts), expected)
    assert gradcheck(lambda x, both: grouped_linear(x, both, counts), (x, both))


def test_grouped_swiglu_is_a_grouped_product_and_its_swiglu(implementation):
    x, both, weight, counts = random(6, 3), random(2, 2, 4, 3), random(6), [2, 4]
    expected = weighted_swiglu(grouped_linear(x, both, counts), weight)
    torch.testing.assert_close(grouped_swiglu(x, both, weight, counts), expected)
    assert gradcheck(lambda x, both, weight: grouped_swiglu(x, both, weight, counts), (x, both, weight))


@pytest.mark.parametrize("deferred", [False, True])
def test_a_store_gets_the_weight_gradient_that_autograd_would_get(deferred):
    x, w, experts = random(6, 3), random(5, 3), random(2, 4, 5)
    (grouped_linear(linear(x, w), experts, [4, 2]) ** 2).sum().backward()
    expected = x.grad, w.grad, experts.grad
    x.grad = w.grad = experts.grad = None
    store = WeightGradientStore()
    for microbatch in range(2):
        loss = (grouped_linear(linear(x, w, store), experts, [4, 2], store) ** 2).sum()
        if not deferred:
            loss.backward()
            continue
        with store.deferred(0, microbatch):
            loss.backward()
    if deferred:
        assert w.grad is None and experts.grad is None
        store.run(0, 1)
        store.run(0, 0)
    for tensor, gradient in zip((x, w, experts), expected, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


def test_swiglu_equals_its_formula_and_passes_gradcheck(implementation):
    gate, up, weight = random(4, 3), random(4, 3, seed=1), random(4)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    both = torch.cat([gate, up], dim=1).detach().requires_grad_()
    torch.testing.assert_close(weighted_swiglu(both, weight), F.silu(gate) * up * weight[:, None])
    assert gradcheck(swiglu, (gate, up))
    assert gradcheck(weighted_swiglu, (both, weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm_equals_torch(dtype, tolerance, implementation):
    x, w = (t.detach().to(dtype).requires_grad_() for t in (random(7, 6), random(6)))
    expected_x, expected_w = (t.detach().clone().requires_grad_() for t in (x, w))
    expected = F.rms_norm(expected_x.float() if dtype == torch.bfloat16 else expected_x, (6,), None, 1e-6)
    expected = expected.to(dtype) * expected_w
    actual = rms_norm(x, w, 1e-6)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    seed = torch.ones_like(actual)
    gradients = torch.autograd.grad(actual, (x, w), seed)
    references = torch.autograd.grad(expected, (expected_x, expected_w), seed)
    for value, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(value, reference, rtol=10 * tolerance, atol=10 * tolerance)


def test_rms_norm_passes_gradcheck(implementation):
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (random(3, 4, 5), random(5)))


def both_implementations(operation, tensors, monkeypatch):
    """Result and gradients with the C++ kernels and without, as pairs."""
    results = []
    for library in (native.library, None):
        monkeypatch.setattr(native, "library", library)
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        out = operation(*inputs)
        upstream = random(*out.shape, seed=9).detach().to(out.dtype)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    return zip(*results, strict=True)


SHAPES = [(0, 8), (1, 1), (3, 7), (129, 64), (1000, 33)]
TOLERANCES = [(torch.float64, 1e-13), (torch.float32, 2e-5)]


@pytest.mark.needs_extension
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp_swiglu_equals_the_reference(shape, dtype, tolerance, level, monkeypatch):
    # wide enough that the exponential saturates
    gate, up, weight = (random(*s, seed=i).to(dtype) for i, s in enumerate((shape, shape, shape[:1])))
    gate = gate * torch.logspace(-1, 3, shape[1], dtype=dtype)
    both = torch.cat([gate, up], dim=1)
    pairs = list(both_implementations(swiglu, (gate, up), monkeypatch))
    monkeypatch.undo()
    for actual, expected in [*pairs, *both_implementations(weighted_swiglu, (both, weight), monkeypatch)]:
        assert actual.isfinite().all()
        size = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.needs_extension
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp_rms_norm_equals_the_reference_also_on_a_part_of_each_row(shape, dtype, tolerance, level, monkeypatch):
    x, weight = random(shape[0], 2 * shape[1]).to(dtype), random(shape[1]).to(dtype)
    operation = lambda x, weight: rms_norm(x[:, : shape[1]], weight, 1e-6)  # noqa: E731
    for actual, expected in both_implementations(operation, (x, weight), monkeypatch):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.needs_extension
def test_types_and_devices_without_cpp_kernels_use_the_reference():
    x = torch.ones(4, 6)
    assert native.takes(x, None) and native.takes(x.double(), torch.nn.Parameter(x.double()))
    assert not native.takes(x.bfloat16()) and not native.takes(x, x.double()) and not native.takes(x.to("meta"))
    assert rms_norm(x.t(), torch.ones(4), 1e-6).shape == (6, 4)


@pytest.mark.parametrize("v_dim, kv_heads", [(4, 4), (8, 2), (6, 4)])
def test_attention_is_a_causal_softmax(v_dim, kv_heads):
    q, k, v = random(2, 4, 5, 8), random(2, kv_heads, 5, 8, seed=1), random(2, kv_heads, 5, v_dim, seed=2)
    scores = 0.3 * q @ k.repeat_interleave(4 // kv_heads, 1).transpose(2, 3)
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1) @ v.repeat_interleave(4 // kv_heads, 1)
    actual = causal_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(actual, expected)
    gradients, references = (torch.autograd.grad(out.sum(), (q, k, v)) for out in (actual, expected))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference)


def there_and_back(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """A token's row times its weights, by way of two experts."""
    experts = torch.tensor([0, 1]).expand(5, 2)
    rows, _, row_map = permute(x, weights, experts, *rank_choices(experts, 2))
    return combine(rows, row_map, weights)


SECOND_DERIVATIVES = {
    "linear": (linear, ((5, 3), (4, 3))),
    "grouped_linear": (lambda x, w: grouped_linear(x, w, [2, 3]), ((5, 3), (2, 4, 3))),
    "swiglu": (swiglu, ((5, 3), (5, 3))),
    "weighted_swiglu": (weighted_swiglu, ((5, 6), (5,))),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), ((5, 3), (3,))),
    "route": (lambda logits: route(logits, None, RouteOptions(2)).weights_TK, ((5, 4),)),  # by the extension alone
    "permute and combine": (there_and_back, ((5, 3), (5, 2))),
}


@pytest.mark.needs_extension
@pytest.mark.parametrize("name", SECOND_DERIVATIVES)
def test_a_second_derivative_is_refused_where_it_would_lack_what_the_kernels_add(name):
    """Kernels are not in the graph of the backward: a gradient penalty would be trained on as if it were constant."""
    operation, shapes = SECOND_DERIVATIVES[name]
    inputs = [random(*shape) for shape in shapes]
    gradients = torch.autograd.grad(operation(*inputs).square().sum(), inputs, create_graph=True)
    penalty = sum((gradient**2).sum() for gradient in gradients) + inputs[0].sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty.backward()
