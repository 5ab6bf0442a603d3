"""Routing, permutation and combination: each implementation against its definition, and against the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from r1mega.kernels import native
from r1mega.kernels.combine import combine
from r1mega.kernels.permute import copy_rows, permute
from r1mega.kernels.route import (
    RouteOptions,
    rank_choices,
    reference_rank_choices,
    reference_route,
    route,
)
from tests.unit.random_routes import random_route


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + sum(shape)))


# tokens, experts, choices, groups, kept groups
SIZES = [
    (0, 8, 2, 1, 1), (1, 1, 1, 1, 1), (1, 8, 8, 4, 4), (7, 6, 1, 1, 1), (50, 12, 3, 4, 2), (200, 33, 16, 3, 2),
    (999, 64, 6, 8, 3), (333, 160, 6, 1, 1), (5000, 32, 4, 1, 1), (700, 256, 8, 8, 4), (300, 384, 16, 12, 4),
]  # fmt: skip
FUNCTIONS = [("sigmoid", True), ("sigmoid", False), ("softmax", True), ("softmax", False)]


def case(size, function, dtype, ties=False, seed=0) -> tuple[Tensor, Tensor, RouteOptions]:
    num_tokens, num_experts, top_k, num_groups, top_k_groups = size
    logits, bias = random(num_tokens, num_experts, dtype=dtype, seed=seed), random(num_experts, seed=seed) * 0.3
    if ties:
        logits, bias = (logits * 2).round() / 2, (bias * 4).round() / 4
    options = RouteOptions(top_k, function[0], num_groups, top_k_groups, function[1], factor=2.5)
    return logits, bias.float(), options


@pytest.mark.needs_extension
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_route_decides_exactly_as_the_reference(size, dtype, ties, level):
    for seed, function in enumerate(FUNCTIONS):
        logits, bias, options = case(size, function, dtype, ties, seed)
        for given in (bias, None):
            actual, expected = (decide(logits, given, options, with_scores=True) for decide in (route, reference_route))
            for name in ("experts_TK", "ranks_TK", "counts_E", "first_row_NE", "scores_TE"):
                assert torch.equal(getattr(actual, name), getattr(expected, name)), name
            tolerance = 1e-6 if dtype == torch.float32 else 1e-13
            torch.testing.assert_close(actual.weights_TK, expected.weights_TK, rtol=tolerance, atol=tolerance)


@pytest.mark.needs_extension
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
@pytest.mark.parametrize("used", ["weights", "scores", "both"])
def test_the_gradient_of_route_is_the_reference_s(function, used, level):
    gradients = []
    for decide in (route, reference_route):
        logits, bias, options = case((200, 24, 4, 4, 2), function, torch.float64)
        logits.requires_grad_()
        choices = decide(logits, bias, options, with_scores=True)
        loss = torch.zeros((), dtype=torch.float64)
        if used != "scores":
            loss = loss + (choices.weights_TK * random(200, 4)).sum()
        if used != "weights":
            loss = loss + (choices.scores_TE.square() * random(200, 24)).sum()
        gradients.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_route_passes_gradcheck(function, implementation):
    logits, bias, options = case((5, 6, 2, 3, 2), function, torch.float64)

    def differentiable(logits: Tensor) -> tuple[Tensor, Tensor]:
        choices = route(logits, bias, options, with_scores=True)
        return choices.weights_TK, choices.scores_TE

    assert gradcheck(differentiable, (logits.requires_grad_(),))


@pytest.mark.needs_extension
@pytest.mark.parametrize("seed", range(60))
def test_at_random_sizes_all_is_as_by_the_reference(seed, monkeypatch):
    dtype = (torch.float32, torch.float64)[seed % 7 % 2]
    case, width = random_route(seed), seed % 40
    results = []
    for library in (native.library, None):
        monkeypatch.setattr(native, "library", library)
        logits = case.logits_TE.to(dtype).requires_grad_()
        choices = route(logits, case.bias_E, case.options)
        decided = choices.experts_TK, choices.ranks_TK, choices.counts_E, choices.first_row_NE
        x = random(len(logits), width, dtype=dtype).requires_grad_()
        rows, row_weights, row_map = permute(x, choices.weights_TK, *decided[:3], first_row_NE=decided[3])
        summed, upstream = combine(rows, row_map), random(*row_weights.shape, dtype=dtype)
        gradients = torch.autograd.grad((row_weights, summed), (logits, x), (upstream, torch.ones_like(summed)))
        leaves = rows.detach().requires_grad_(), choices.weights_TK.detach().requires_grad_()
        weighted = combine(leaves[0], row_map, leaves[1])
        of_weighted = torch.autograd.grad(weighted, leaves, random(*weighted.shape, dtype=dtype))
        exact = *decided, rows, row_map.row_of_choice
        # Where a score is NaN, so is the gradient of that expert if it was chosen; if not, it may be.
        of_logits = gradients[0][case.logits_TE.isfinite().all(1)]
        sums = choices.score_sums_E, summed, weighted
        close = choices.weights_TK, row_weights, *sums, gradients[1], of_logits, *of_weighted
        results.append((exact, close))
    (exact, close), (expected_exact, expected_close) = results
    assert all(torch.equal(*pair) for pair in zip(exact, expected_exact, strict=True)), case.name
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(close, expected_close, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_what_is_chosen_where_logits_are_not_finite(function, implementation):
    nan, inf = math.nan, math.inf
    logits = torch.tensor([
        [0, nan, 1, nan, 0, 2], [-inf, 0, inf, 1, inf, 0], [-inf] * 6, [nan] * 6, [-inf, 0, -inf, -inf, -inf, -inf],
    ])  # fmt: skip
    choices = route(logits, None, RouteOptions(3, function))
    experts, weights = choices.experts_TK.tolist(), choices.weights_TK
    if function == "sigmoid":
        assert experts == [[1, 3, 5], [2, 4, 3], [0, 1, 2], [0, 1, 2], [1, 0, 2]]
        assert weights[:, 0].isnan().tolist() == [True, False, False, True, False]
    else:  # a token with NaN, with +infinity or with -infinity alone has no softmax
        assert experts == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 0, 2]]
        assert weights[:4].isnan().all() and weights[4].tolist() == [1, 0, 0]
    grouped = route(logits, None, RouteOptions(2, function, num_groups=3, top_k_groups=1)).experts_TK.tolist()
    assert grouped == ([[1, 0], [2, 3], [0, 1], [0, 1], [1, 0]] if function == "sigmoid" else [[0, 1]] * 4 + [[1, 0]])
    biased = route(logits, torch.tensor([0.0, 0, 0, 0, 0, -inf]), RouteOptions(6, function)).experts_TK
    assert biased[1:, -1].tolist() == [5] * 4  # the least, or the last of equals
    assert choices.counts_E.sum() == 15


@pytest.mark.needs_extension
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_the_backward_keeps_the_scores_of_the_chosen_experts_alone_where_they_are_enough(function):
    logits, bias, options = case((100, 24, 4, 4, 2), function, torch.float64)
    for with_scores in (False, True):
        choices = route(logits.requires_grad_(), bias, options, with_scores)
        kept = sum(tensor.numel() for tensor in choices.weights_TK.grad_fn.saved_tensors)
        needs_all = with_scores or function == ("softmax", False)
        assert kept == 100 * 4 + (100 * 24 if needs_all else 100 * 4)


def test_groups_are_ranked_by_the_sum_of_their_two_best_biased_scores(implementation):
    logits, bias, options = case((50, 12, 3, 4, 2), ("sigmoid", True), torch.float64)
    choices = route(logits, bias, options)
    for row, experts in zip((logits.sigmoid() + bias).tolist(), choices.experts_TK.tolist(), strict=True):
        groups = [row[start : start + 3] for start in range(0, 12, 3)]
        best = sorted(range(4), key=lambda g: -sum(sorted(groups[g])[-2:]))[:2]
        allowed = [e for e in range(12) if e // 3 in best]
        assert experts == sorted(allowed, key=lambda e: -row[e])[:3]


def test_of_equal_scores_the_lower_expert_and_the_lower_group_win(implementation):
    assert route(torch.zeros(1, 40), None, RouteOptions(3)).experts_TK.tolist() == [[0, 1, 2]]
    grouped = route(torch.zeros(1, 40), None, RouteOptions(12, num_groups=4, top_k_groups=2))
    assert grouped.experts_TK.tolist() == [list(range(12))]
    negative_zero = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([-0.5, -0.5, -0.5])
    assert route(*negative_zero, RouteOptions(2)).experts_TK.tolist() == [[0, 1]]


def test_infinite_logits_are_scores_of_one_and_zero(implementation):
    logits = torch.tensor([[-math.inf, 0.0, math.inf, 1.0]])
    choices = route(logits, None, RouteOptions(3), with_scores=True)
    assert choices.experts_TK.tolist() == [[2, 3, 1]]
    assert choices.weights_TK.isfinite().all() and choices.scores_TE[0, 2] == 1 and choices.scores_TE[0, 0] == 0


@pytest.mark.parametrize("num_groups", [1, 4])
def test_nan_is_chosen_first_so_that_it_is_seen_and_experts_stay_valid(implementation, num_groups):
    logits = random(3, 8, dtype=torch.float32)
    logits[0, 5] = math.nan
    logits[1] = math.nan
    logits[2, 3] = -math.nan
    options = RouteOptions(3, num_groups=num_groups, top_k_groups=num_groups // 2 or 1)
    choices, expected = route(logits, None, options), reference_route(logits, None, options)
    assert (
        choices.experts_TK[0, 0] == 5 and choices.experts_TK[1].tolist() == [0, 1, 2] and choices.experts_TK[2, 0] == 3
    )
    assert choices.weights_TK.isnan().all() and choices.counts_E.sum() == 9
    assert torch.equal(choices.experts_TK, expected.experts_TK) and torch.equal(choices.ranks_TK, expected.ranks_TK)


@pytest.mark.parametrize("num_tokens, top_k, num_experts", [(0, 2, 4), (1, 1, 1), (300, 3, 5), (2000, 8, 256)])
def test_a_rank_counts_the_earlier_choices_of_its_expert(implementation, num_tokens, top_k, num_experts):
    experts = chosen(num_tokens, top_k, num_experts)
    experts[::7] = num_experts  # dropped
    ranks, counts = rank_choices(experts, num_experts)
    seen = [0] * (num_experts + 1)
    for expert, rank in zip(experts.flatten().tolist(), ranks.flatten().tolist(), strict=True):
        assert rank == seen[expert]
        seen[expert] += 1
    assert counts.tolist() == seen[:-1]
    assert torch.equal(ranks, reference_rank_choices(experts, num_experts)[0])


def chosen(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices


def permuted(x: Tensor, weights: Tensor, experts: Tensor, num_experts: int, **options):
    return permute(x, weights, experts, *rank_choices(experts, num_experts), **options)


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_rows_are_sorted_by_expert_and_within_an_expert_by_token(implementation, num_tokens):
    experts = chosen(num_tokens, 3, 5)
    x = torch.arange(num_tokens, dtype=torch.float32).unsqueeze(1)
    rows, weights, _ = permuted(x, experts * 100 + x, experts, 5)
    pairs = sorted((int(e), t) for t, row in enumerate(experts) for e in row)
    assert rows.flatten().tolist() == [t for _, t in pairs]
    assert weights.tolist() == [100 * e + t for e, t in pairs]


@pytest.mark.parametrize("dtype, width", [(torch.float32, 12), (torch.float64, 5), (torch.bfloat16, 8)], ids=str)
@pytest.mark.parametrize("gap", [1, 4])
def test_rows_with_gaps_between_them_become_rows_without(implementation, gap, dtype, width):
    experts, x = chosen(30, 3, 5), random(30, width + gap).to(dtype)[:, :width]
    for options in ({}, {"capacity": 31}):
        rows, _, row_map = permuted(x, torch.ones(30, 3), experts, 5, **options)
        assert rows.is_contiguous() and copy_rows(x, row_map).is_contiguous()
        assert torch.equal(rows, permuted(x.contiguous(), torch.ones(30, 3), experts, 5, **options)[0])
        assert torch.equal(copy_rows(x, row_map), rows)


@pytest.mark.parametrize("capacity", [None, 40])
def test_the_first_rows_that_route_gives_are_those_of_the_counts(implementation, capacity):
    choices = route(random(70, 12, dtype=torch.float32), None, RouteOptions(3))
    decided = choices.experts_TK, choices.ranks_TK, choices.counts_E
    x, options = random(70, 5, dtype=torch.float32), {"capacity": capacity}
    first_rows = (choices.first_row_NE, None)
    given, counted = (permute(x, choices.weights_TK, *decided, **options, first_row_NE=first) for first in first_rows)
    assert torch.equal(given[0], counted[0]) and torch.equal(given[1], counted[1])
    if capacity is not None:
        assert torch.equal(given[2].row_of_choice // capacity, choices.experts_TK)


def test_score_sums_are_over_tokens_of_scores_divided_by_their_sum(implementation):
    for function in ("sigmoid", "softmax"):
        choices = route(random(9, 6), None, RouteOptions(2, function), with_scores=True)
        expected = sum(row / row.sum() for row in choices.scores_TE)
        torch.testing.assert_close(choices.score_sums_E, expected)
        assert not choices.score_sums_E.requires_grad


DROPS = {"whole": {}, "dropped": {"may_drop": True}, "padded": {"may_drop": True, "capacity": 9}}


@pytest.mark.parametrize("kind", DROPS)
def test_permute_and_combine_pass_gradcheck(implementation, kind):
    experts = chosen(9, 3, 5)
    if kind != "whole":
        experts[2] = 5
        experts[5, 1] = 5
    x, weights = random(9, 4).requires_grad_(), random(9, 3).requires_grad_()
    rows, _, row_map = permuted(x, weights, experts, 5, **DROPS[kind])
    times = (experts < 5).sum(1, keepdim=True)
    torch.testing.assert_close(combine(rows, row_map), times * x)
    assert gradcheck(lambda x, weights: permuted(x, weights, experts, 5, **DROPS[kind])[:2], (x, weights))
    rows = rows.detach().requires_grad_()
    assert gradcheck(lambda rows: combine(rows, row_map), (rows,))
    expected = sum_of_weighted_rows(rows, weights, row_map.row_of_choice)
    torch.testing.assert_close(combine(rows, row_map, weights), expected)
    assert gradcheck(lambda rows, weights: combine(rows, row_map, weights), (rows, weights))


def sum_of_weighted_rows(rows: Tensor, weights: Tensor, row_of_choice: Tensor) -> Tensor:
    out = rows.new_zeros(weights.shape[0], rows.shape[1])
    for token, choice in itertools.product(*map(range, weights.shape)):
        if row_of_choice[token, choice] >= 0:
            out[token] += weights[token, choice] * rows[row_of_choice[token, choice]]
    return out


def test_weighted_rows_are_summed_in_the_wider_type_and_unused_weights_do_not_count(implementation):
    experts = chosen(9, 3, 5)
    experts[5, 1] = 5
    _, _, row_map = permuted(random(9, 4), random(9, 3), experts, 5, may_drop=True)
    rows, weights = random(row_map.num_rows, 4, dtype=torch.bfloat16), random(9, 3, dtype=torch.float32)
    expected = sum_of_weighted_rows(rows.float(), weights, row_map.row_of_choice).bfloat16()
    weights[5, 1] = math.nan
    out = combine(rows, row_map, weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=4e-3, atol=1e-6)


def test_padding_rows_are_zero_and_so_are_their_weights(implementation):
    experts = chosen(6, 2, 4)
    rows, weights, row_map = permuted(torch.ones(6, 3), torch.ones(6, 2), experts, 4, capacity=7)
    counts = torch.bincount(experts.flatten(), minlength=4).tolist()
    expected = [float(place < counts[expert]) for expert, place in itertools.product(range(4), range(7))]
    assert weights.tolist() == expected and rows.tolist() == [[value] * 3 for value in expected]
    assert row_map.num_rows == 28


@pytest.mark.needs_extension
@pytest.mark.parametrize("kind", DROPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "num_tokens, top_k, num_experts, width",
    [(0, 2, 4, 8), (1, 1, 1, 1), (70, 7, 9, 33), (5000, 4, 32, 128), (300, 16, 384, 20)],
)
def test_permute_and_combine_equal_the_reference(
    num_tokens, top_k, num_experts, width, dtype, kind, level, monkeypatch
):
    experts = chosen(num_tokens, top_k, num_experts)
    options = dict(DROPS[kind])
    if kind != "whole":
        experts[::3, ::2] = num_experts
    if kind == "padded":
        options["capacity"] = int(rank_choices(experts, num_experts)[1].max())
    results = []
    for library in (native.library, None):
        monkeypatch.setattr(native, "library", library)
        x, weights = (random(num_tokens, n, dtype=dtype).requires_grad_() for n in (width, top_k))
        rows, row_weights, row_map = permuted(x, weights, experts, num_experts, **options)
        out = combine(rows * row_weights.unsqueeze(1), row_map)
        gradients = torch.autograd.grad(out, (x, weights), random(num_tokens, width, dtype=dtype, seed=1))
        results.append((rows, row_weights, row_map.row_of_choice, out, *gradients))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(*(result[:3] for result in results), strict=True))


@pytest.mark.needs_extension
def test_the_same_bits_twice_and_whatever_the_number_of_threads():
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 1, 3):
            torch.set_num_threads(number)
            logits, bias, options = case((3000, 64, 6, 8, 3), ("sigmoid", True), torch.float32)
            choices = route(logits.requires_grad_(), bias, options)
            x = random(3000, 96, dtype=torch.float32).requires_grad_()
            decided = choices.experts_TK, choices.ranks_TK, choices.counts_E
            rows, weights, row_map = permute(x, choices.weights_TK, *decided)
            out = combine(rows.sin() * weights.unsqueeze(1), row_map) + combine(rows.cos(), row_map, choices.weights_TK)
            results.append((*decided, out, *torch.autograd.grad(out.square().sum(), (x, logits))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))
