"""Every operation equals plain PyTorch, forward and backward, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from r1mega.kernels.attention import causal_attention
from r1mega.kernels.linear import grouped_linear, linear, linears
from r1mega.kernels.permute import combine, map_rows, pad_rows, permute
from r1mega.kernels.rms_norm import rms_norm
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
    assert gradcheck(lambda x, w: grouped_linear(x, w, counts), (x, w))


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


def test_swiglu_equals_its_formula_and_passes_gradcheck():
    gate, up, weight = random(4, 3), random(4, 3, seed=1), random(4)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    both = torch.cat([gate, up], dim=1).detach().requires_grad_()
    torch.testing.assert_close(weighted_swiglu(both, weight), F.silu(gate) * up * weight[:, None])
    assert gradcheck(swiglu, (gate, up))
    assert gradcheck(weighted_swiglu, (both, weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm_equals_torch(dtype, tolerance):
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


def test_rms_norm_passes_gradcheck():
    assert gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (random(3, 4, 5), random(5)))


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


def choices(num_tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_rows_are_sorted_by_expert_and_within_an_expert_by_token(num_tokens):
    experts = choices(num_tokens, 3, 5)
    slot_of_row, counts, row_map = map_rows(experts, 5)
    pairs = sorted((int(e), t) for t, row in enumerate(experts) for e in row)
    assert list(zip(experts.flatten()[slot_of_row].tolist(), row_map.token_of_row.tolist(), strict=True)) == pairs
    assert counts.tolist() == [sum(e == i for e, _ in pairs) for i in range(5)]


def test_permute_then_combine_multiplies_by_the_number_of_experts_and_passes_gradcheck():
    _, _, row_map = map_rows(choices(9, 3, 5), 5)
    x, rows = random(9, 4), random(27, 4)
    torch.testing.assert_close(combine(permute(x, row_map), row_map), 3 * x)
    assert gradcheck(lambda x: permute(x, row_map), (x,))
    assert gradcheck(lambda rows: combine(rows, row_map), (rows,))


def test_dropped_choices_get_no_row_and_a_token_without_rows_gets_zeros():
    experts = choices(6, 2, 4)
    experts[2] = 4
    experts[5, 1] = 4
    slot_of_row, counts, row_map = map_rows(experts, 4, may_drop=True)
    assert slot_of_row.shape[0] == int(counts.sum()) == 9
    x = random(6, 3)
    expected = x * torch.tensor([2, 2, 0, 2, 2, 1], dtype=torch.float64)[:, None]
    torch.testing.assert_close(combine(permute(x, row_map), row_map), expected)
    assert gradcheck(lambda x: permute(x, row_map), (x,))


def test_padding_rows_belong_to_no_token_and_have_weight_zero():
    experts = choices(6, 2, 4)
    slot_of_row, counts, row_map = map_rows(experts, 4)
    weights = random(6, 2).flatten()[slot_of_row]
    padded_weights, padded_counts, padded_map = pad_rows(weights, counts, row_map, 7)
    assert padded_counts.tolist() == [7] * 4
    assert int((padded_weights != 0).sum()) == 12
    x = random(6, 3)
    weighted = combine(permute(x, padded_map) * padded_weights[:, None], padded_map)
    torch.testing.assert_close(weighted, combine(permute(x, row_map) * weights[:, None], row_map))
