"""Routing and permutation on a GPU: kernels against the reference on the same GPU and on the CPU, without a wait."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1mega.kernels import cuda
from r1mega.kernels.combine import combine
from r1mega.kernels.permute import permute
from r1mega.kernels.route import (
    RouteOptions,
    rank_choices,
    reference_rank_choices,
    reference_route,
    route,
)
from tests.gpu.routing import FUNCTIONS, assert_equal, no_wait, options_of

# tokens, experts, choices, groups, kept groups
SIZES = [
    (0, 8, 2, 1, 1), (1, 1, 1, 1, 1), (70, 8, 8, 4, 4), (130, 16, 2, 4, 2), (65, 60, 4, 1, 1), (5000, 64, 6, 8, 3),
    (333, 160, 6, 8, 3), (8192, 256, 8, 8, 4), (777, 384, 16, 12, 4), (2048, 384, 8, 1, 1), (100, 378, 16, 9, 3),
    (200, 33, 16, 3, 2),
]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda")


def test_the_cuda_library_is_built_and_takes_the_gpus_tensors() -> None:
    assert cuda.library is not None, cuda.reason
    assert cuda.takes_route(random(4, 8), None, RouteOptions(2))


def test_route_decides_as_the_reference_on_this_gpu() -> None:
    for size in SIZES:
        for seed, function in enumerate(FUNCTIONS):
            logits, bias = random(*size[:2], seed=seed), random(size[1]) * 0.3
            if function[0] == "softmax" or seed == 1:  # few different values: many ties, and none is only nearly equal
                logits, bias = (logits * 2).round() / 2, None
            assert_equal(
                route(logits, bias, options_of(size, function)),
                reference_route(logits, bias, options_of(size, function)),
                1e-4,
            )


def test_nan_and_infinities_are_ordered_as_by_the_reference() -> None:
    logits = (random(8, 40) * 2).round() / 2
    logits[0, 5], logits[1], logits[2, 33], logits[3, 7] = math.nan, math.nan, -math.nan, math.inf
    logits[4, ::2], logits[5], logits[6, 1::2] = -math.inf, -math.inf, math.inf
    for function in ("sigmoid", "softmax"):
        for groups in ((1, 1), (4, 2)):
            options = RouteOptions(6, function, *groups)
            assert_equal(route(logits, None, options), reference_route(logits, None, options), 1e-4)


def test_gradients_equal_the_reference() -> None:
    for size in SIZES:
        for function in FUNCTIONS:
            gradients = []
            for decide in (route, reference_route):
                logits = ((random(*size[:2]) * 2).round() / 2).requires_grad_()
                weights = decide(logits, None, options_of(size, function)).weights_TK
                gradients.append(torch.autograd.grad(weights, logits, random(size[0], size[2]))[0])
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_choices_made_elsewhere_are_ranked_as_by_the_reference_and_without_a_wait() -> None:
    experts = random(5000, 60).topk(6).indices
    experts[::3, ::2] = 60
    expected, expected_counts = reference_rank_choices(experts, 60)
    rank_choices(experts, 60)
    with no_wait():
        ranks, counts = rank_choices(experts, 60)
    assert torch.equal(ranks[experts < 60], expected[experts < 60]) and torch.equal(counts, expected_counts)


def test_permute_and_combine_move_every_type_as_a_sort_would() -> None:
    for width in (1, 7, 33, 512, 7168):
        choices = route(random(777, 64), None, RouteOptions(6))
        order = choices.experts_TK.flatten().argsort(stable=True)
        for dtype in DTYPES:
            tokens = torch.arange(777 * width, device="cuda").remainder(251).view(777, width).to(dtype)
            decided = choices.experts_TK, choices.ranks_TK, choices.counts_E
            rows, weights, row_map = permute(tokens, choices.weights_TK, *decided, first_row_NE=choices.first_row_NE)
            assert torch.equal(rows, tokens[order // 6])
            assert torch.equal(weights, choices.weights_TK.flatten()[order])
            if dtype.is_floating_point:
                sums = combine(rows, row_map)
                torch.testing.assert_close(sums.double(), 6 * tokens.double(), rtol=1e-2, atol=0)


def test_padded_rows_are_zero_on_the_gpu_too() -> None:
    choices = route(random(200, 8), None, RouteOptions(2))
    capacity = int(choices.counts_E.max()) + 3
    decided = choices.experts_TK, choices.ranks_TK, choices.counts_E
    ones = torch.ones(200, 5, device="cuda")
    rows, weights, row_map = permute(
        ones, torch.ones(200, 2, device="cuda"), *decided, capacity=capacity, first_row_NE=choices.first_row_NE
    )
    real = torch.arange(capacity, device="cuda") < choices.counts_E.unsqueeze(1)
    assert torch.equal(weights, real.flatten().float()) and torch.equal(
        rows, real.flatten().float().unsqueeze(1).expand(-1, 5)
    )


def forward_and_backward(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    choices = route(logits, None, RouteOptions(6, num_groups=8, top_k_groups=4))
    decided = choices.experts_TK, choices.ranks_TK, choices.counts_E
    rows, weights, row_map = permute(tokens, choices.weights_TK, *decided, first_row_NE=choices.first_row_NE)
    out = combine(rows * weights.unsqueeze(1).to(rows.dtype), row_map)
    return *decided, choices.score_sums_E, out, *torch.autograd.grad(out.float().square().sum(), (logits, tokens))


def test_the_same_bits_twice_and_no_wait_for_the_gpu() -> None:
    logits, tokens = random(3000, 64).requires_grad_(), random(3000, 96).requires_grad_()
    first = forward_and_backward(logits, tokens)  # compiles what is compiled at first use
    with no_wait():
        second = forward_and_backward(logits, tokens)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_kernels_run_on_the_current_stream_and_inside_a_graph() -> None:
    logits, tokens = random(500, 64), random(500, 96)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decide = lambda: route(logits, None, RouteOptions(6)).weights_TK  # noqa: E731
        decide()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            weights = decide()
        logits.copy_(random(500, 64, seed=7))
        graph.replay()
    stream.synchronize()
    torch.testing.assert_close(weights, reference_route(logits, None, RouteOptions(6)).weights_TK)
    assert tokens.is_cuda
