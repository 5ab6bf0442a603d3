"""What the Triton kernels must do. Interpreted on the CPU by ``test_kernels_triton.py``, on a GPU by ``tests/gpu``.

The interpreter takes about 80 microseconds an operation of a program: sizes are small, and odd on purpose.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from r1mega.config import MoEConfig
from r1mega.kernels import cuda, triton
from r1mega.kernels import permute as permute_operation
from r1mega.kernels import route as route_operation
from r1mega.kernels import scan as scan_operation
from r1mega.kernels.combine import combine
from r1mega.kernels.grouped_swiglu import grouped_swiglu
from r1mega.kernels.linear import grouped_linear
from r1mega.kernels.permute import RowMap, find_rows
from r1mega.kernels.policy_head import policy_head, reference_policy_head
from r1mega.kernels.policy_tile import RowGradients, merge, reference_gradient, reference_statistics
from r1mega.kernels.rms_norm import rms_norm
from r1mega.kernels.route import RouteOptions, rank_choices, reference_route
from r1mega.kernels.scan import first_rows
from r1mega.kernels.swiglu import swiglu, weighted_swiglu
from r1mega.kernels.triton import combine as combine_kernels
from r1mega.kernels.triton import grouped, permute, route
from r1mega.kernels.triton import policy_head as policy_kernels
from r1mega.kernels.triton import rms_norm as rms_norm_kernels
from r1mega.kernels.triton import scan as scan_kernels
from r1mega.kernels.triton.compat import pieces
from r1mega.kernels.triton.scan import TILE_TOKENS
from r1mega.moe import dispatcher
from r1mega.moe.layer import MoELayer
from r1mega.parallel_state import ParallelState
from r1mega.pipeline.weight_gradient import WeightGradientStore
from tests.unit.random_routes import random_route

# The interpreter is NumPy, which warns where an exponential saturates as it should.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cpu" if triton.interpreting() else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
FUNCTIONS = [("sigmoid", True), ("sigmoid", False), ("softmax", True), ("softmax", False)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def chosen(num_tokens: int, top_k: int, num_experts: int, dropped: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    experts = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
    if dropped:
        experts[::3, ::2] = num_experts
    return experts.to(DEVICE)


def map_of(experts_TK: Tensor, num_experts: int, padding: int = 0) -> RowMap:
    """The rows of choices, and ``padding`` more that belong to none."""
    ranks, counts = rank_choices(experts_TK, num_experts)
    num_rows = int(counts.sum()) + padding
    dropped = bool((experts_TK == num_experts).any())
    row_map = RowMap(torch.empty_like(experts_TK), num_rows, dropped, padding > 0)
    find_rows(experts_TK, ranks, first_rows(counts).unsqueeze(0), row_map)
    return row_map


def assert_rounded(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    """``actual`` is ``expected`` (float64) up to float32's errors in sums of this size and one rounding to nearest."""
    rounding = torch.finfo(actual.dtype).eps / 2
    assert actual.shape == expected.shape and actual.device.type == DEVICE
    torch.testing.assert_close(actual.double(), expected, rtol=1.01 * rounding + 1e-6, atol=2e-6 * size, equal_nan=True)


def assert_same_gradients(operation, reference, inputs: list[Tensor], tolerance: float) -> None:
    """Results and gradients of ``operation`` are those of ``reference`` on float64 copies."""
    given = [tensor.detach().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    actual, expected = operation(*given), reference(*wide)
    assert actual.dtype == inputs[0].dtype
    upstream = random(*actual.shape, dtype=actual.dtype, seed=9)
    gradients = torch.autograd.grad(actual, given, upstream)
    references = torch.autograd.grad(expected, wide, upstream.double())
    for value, wanted in zip((actual, *gradients), (expected, *references), strict=True):
        size = max(1.0, float(wanted.detach().abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance * size)


def weighted_sum(rows_RH: Tensor, weights_TK: Tensor | None, row_map: RowMap) -> Tensor:
    rows = row_map.row_of_choice
    gathered = torch.cat([rows_RH, rows_RH.new_zeros(1, rows_RH.shape[1])])[rows]
    weights = 1.0 if weights_TK is None else weights_TK.masked_fill(rows < 0, 0.0).unsqueeze(2)
    return (gathered * weights).sum(1)


# tokens, experts, choices, width
ROWS = [(0, 4, 2, 8), (1, 1, 1, 1), (7, 5, 3, 33), (5, 60, 16, 20), (3, 9, 8, 1100)]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ROWS, ids=str)
def test_combine_sums_each_token_s_rows_and_rounds_once(size, dtype, dropped):
    num_tokens, num_experts, top_k, width = size
    row_map = map_of(chosen(num_tokens, top_k, num_experts, dropped), num_experts)
    rows, weights = random(row_map.num_rows, width, dtype=dtype), random(num_tokens, top_k)
    for given in (None, weights):
        actual = combine_kernels.sum_rows(rows, row_map.row_of_choice, given)
        wide = None if given is None else given.double()
        assert_rounded(actual, weighted_sum(rows.double(), wide, row_map), size=4)


@pytest.mark.parametrize("kind", ["whole", "dropped", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ROWS[1:], ids=str)
def test_combine_and_its_gradients_equal_the_reference(size, dtype, kind):
    num_tokens, num_experts, top_k, width = size
    experts = chosen(num_tokens, top_k, num_experts, kind != "whole")
    row_map = map_of(experts, num_experts, padding=3 if kind == "padded" else 0)
    rows, weights = random(row_map.num_rows, width, dtype=dtype), random(num_tokens, top_k)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3

    def summed(rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return combine(rows, row_map, weights)

    assert_same_gradients(summed, lambda rows: weighted_sum(rows, None, row_map), [rows], tolerance)
    assert_same_gradients(summed, lambda rows, w: weighted_sum(rows, w, row_map), [rows, weights], tolerance)


def test_a_dropped_choice_s_weight_is_not_used_whatever_it_is():
    row_map = map_of(chosen(7, 3, 5, dropped=True), 5)
    weights = random(7, 3).masked_fill(row_map.row_of_choice < 0, math.nan).requires_grad_()
    out = combine(random(row_map.num_rows, 9).requires_grad_(), row_map, weights)
    (gradient,) = torch.autograd.grad(out.sum(), weights)
    assert out.isfinite().all() and gradient.isfinite().all()
    assert (gradient[row_map.row_of_choice < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (5, 1100)], ids=str)
def test_swiglu_and_its_gradients_equal_the_formula(shape, dtype):
    # wide enough that the exponential saturates
    gate, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    gate = gate * torch.logspace(-1, 3, shape[1], dtype=dtype, device=DEVICE)
    weight, tolerance = random(shape[0]), 1e-5 if dtype == torch.float32 else 8e-3

    def formula(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up

    def weighted(both: Tensor, weight: Tensor) -> Tensor:
        return formula(*both.chunk(2, dim=1)) * weight.unsqueeze(1)

    assert_same_gradients(swiglu, formula, [gate, up], tolerance)
    assert_same_gradients(weighted_swiglu, weighted, [torch.cat([gate, up], dim=1), weight], tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (2, 3, 40), (13, 4)], ids=str)
def test_rms_norm_and_its_gradients_equal_the_formula_also_on_a_part_of_each_row(shape, dtype, monkeypatch):
    monkeypatch.setattr(rms_norm_kernels, "PROGRAMS", 4)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    given, tolerance = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)], 1e-5
    if dtype == torch.bfloat16:
        tolerance = 2e-2
    assert_same_gradients(lambda x, weight: rms_norm(x, weight, 1e-6), formula, given, tolerance)
    if len(shape) == 2:
        given = [random(shape[0], 2 * shape[1], dtype=dtype), given[1]]
        part = slice(0, shape[1])
        assert_same_gradients(
            lambda x, weight: rms_norm(x[:, part], weight, 1e-6), lambda x, w: formula(x[:, part], w), given, tolerance
        )


# tokens, experts, choices, groups, kept groups
ROUTES = [
    (0, 8, 2, 1, 1), (1, 1, 1, 1, 1), (64, 8, 8, 4, 4), (65, 60, 6, 4, 2), (130, 33, 5, 3, 2), (67, 256, 8, 8, 4),
    (9, 12, 2, 12, 5), (20, 384, 16, 12, 4),
]  # fmt: skip


def route_case(size, function, ties=False, seed=0) -> tuple[Tensor, Tensor, RouteOptions]:
    num_tokens, num_experts, top_k, num_groups, top_k_groups = size
    logits, bias = random(num_tokens, num_experts, seed=seed), random(num_experts, seed=seed) * 0.3
    if ties:
        logits, bias = (logits * 2).round() / 2, (bias * 4).round() / 4
    return logits, bias, RouteOptions(top_k, function[0], num_groups, top_k_groups, function[1], factor=2.5)


def assert_routed(logits: Tensor, bias: Tensor | None, options: RouteOptions) -> None:
    experts, weights, ranks, tile_counts, tile_sums, scores = route.route(logits, bias, options)
    expected = reference_route(logits, bias, options, with_scores=True)
    assert torch.equal(experts, expected.experts_TK)
    torch.testing.assert_close(weights, expected.weights_TK, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(scores, expected.scores_TE.gather(1, experts), rtol=1e-6, atol=0, equal_nan=True)
    shares = expected.scores_TE / (expected.scores_TE.sum(1, keepdim=True) + 1e-20)
    torch.testing.assert_close(tile_sums.sum(0), shares.sum(0), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert tile_counts.shape[0] == pieces(logits.shape[0], TILE_TOKENS) and tile_counts.dtype == torch.int32
    for tile, of_tile in enumerate(experts.split(TILE_TOKENS)):
        if of_tile.numel():
            expected_ranks, expected_counts = rank_choices(of_tile, logits.shape[1])
            assert torch.equal(ranks[tile * TILE_TOKENS :][: len(of_tile)], expected_ranks)
            assert torch.equal(tile_counts[tile].long(), expected_counts)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", ROUTES, ids=str)
def test_route_decides_exactly_as_the_reference(size, ties):
    for seed, function in enumerate(FUNCTIONS[ties::2]):
        logits, bias, options = route_case(size, function, ties, seed)
        assert_routed(logits, bias if seed == ties else None, options)


@pytest.mark.parametrize("seed", range(8, 24))
def test_at_random_sizes_route_decides_as_the_reference_also_where_logits_are_not_finite(seed):
    case = random_route(seed, most_tokens=70, kinds=("with ties", "not finite"))
    bias = None if case.bias_E is None else case.bias_E.to(DEVICE)
    assert_routed(case.logits_TE.to(DEVICE), bias, case.options)


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_nan_and_infinite_logits_and_equal_scores_are_chosen_as_the_reference_does(num_groups, function):
    logits = random(6, 8)
    logits[0, 5] = math.nan
    logits[1] = math.nan
    logits[2, 3] = -math.nan
    logits[3, 2:4] = -math.inf
    logits[4, 6] = math.inf
    logits[5] = 0.0
    options = RouteOptions(3, function, num_groups, num_groups // 2 or 1)
    assert_routed(logits, None, options)
    for bias in ([0.25, -0.0, 0.0, -0.25] * 2, [-0.5] * 8, [0.0] * 6 + [-math.nan, 0.0], [0.0] * 7 + [-math.inf]):
        assert_routed(logits, torch.tensor(bias, device=DEVICE), options)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_the_gradient_of_route_is_the_reference_s(function, sums):
    for size in ROUTES[:5]:
        logits, bias, options = route_case(size, function)
        wide = logits.double().requires_grad_()
        expected = reference_route(wide, bias.double(), options, with_scores=True)
        grad_weights = random(*expected.weights_TK.shape, seed=5)
        grad_sums = random(size[1], seed=6) if sums else None
        loss = (expected.weights_TK * grad_weights).sum()
        if grad_sums is not None:
            shares = expected.scores_TE / (expected.scores_TE.sum(1, keepdim=True) + 1e-20)
            loss = loss + (shares.sum(0) * grad_sums).sum()
        (wanted,) = torch.autograd.grad(loss, wide)
        chosen_scores = expected.scores_TE.detach().gather(1, expected.experts_TK).float()
        given = grad_weights, expected.experts_TK.contiguous(), chosen_scores, size[1], options
        needed = logits if sums or options.needs_logits else None
        actual = route.route_backward(*given, needed, grad_sums)
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-6)


def test_the_first_row_of_each_tile_comes_after_the_tiles_and_experts_before_it(monkeypatch):
    monkeypatch.setattr(scan_kernels, "SCANNED_AT_ONCE", 128)  # two tiles
    monkeypatch.setattr(cuda, "library", None)
    monkeypatch.setattr(scan_operation, "reference_scan", None)
    for num_tiles in (0, 1, 7):
        tile_counts, tile_sums = random(num_tiles, 60).abs().mul(3).int(), random(num_tiles, 60)
        first_row, counts = permute.scan(tile_counts)
        before = tile_counts.t().flatten().cumsum(0) - tile_counts.t().flatten()
        assert torch.equal(first_row, before.view(60, num_tiles).t()) and torch.equal(counts, tile_counts.sum(0))
        found = scan_operation.scan(tile_counts, tile_sums)
        assert all(torch.equal(*pair) for pair in zip(found, (first_row, counts, tile_sums.sum(0)), strict=True))


@pytest.mark.parametrize("num_tokens", [0, 1, 64, 130])
@pytest.mark.parametrize("num_experts, top_k, width, dtype", [(5, 3, 7, torch.bfloat16), (60, 4, 1, torch.float64)])
def test_rows_are_sorted_by_expert_and_within_an_expert_by_token(num_tokens, num_experts, top_k, width, dtype):
    experts = chosen(num_tokens, top_k, num_experts)
    tokens = random(num_tokens, width, dtype=dtype)
    tiles = [rank_choices(tile, num_experts) for tile in experts.split(TILE_TOKENS) if len(tile)]
    ranks = torch.cat([experts[:0], *(ranks for ranks, _ in tiles)])
    tile_counts = torch.stack([counts for _, counts in tiles]).int() if tiles else experts.new_empty(0, num_experts)
    first_row, counts = permute.scan(tile_counts.int())
    rows, row_of_choice = permute.permute(tokens, experts, ranks, first_row)
    expected = map_of(experts, num_experts)
    assert torch.equal(counts, torch.bincount(experts.flatten(), minlength=num_experts))
    assert torch.equal(row_of_choice, expected.row_of_choice)
    assert torch.equal(rows[row_of_choice.flatten()], tokens.repeat_interleave(top_k, 0))
    apart = random(num_tokens, width + 3, dtype=dtype)[:, :width].copy_(tokens)  # with gaps between rows
    assert torch.equal(permute.permute(apart, experts, ranks, first_row)[0], rows)
    assert torch.equal(combine_kernels.copy_rows(apart, row_of_choice, len(rows)), rows)


def test_dropped_choices_own_no_row_and_ranks_may_count_all_tokens():
    experts = chosen(70, 3, 5, dropped=True)
    tokens, (ranks, counts) = random(70, 6), rank_choices(experts, 5)
    expected = map_of(experts, 5, padding=4)
    first_row = (counts.cumsum(0) - counts).unsqueeze(0)
    rows, row_of_choice = permute.permute(tokens, experts, ranks, first_row, expected.num_rows, padded_rows=True)
    assert torch.equal(row_of_choice, expected.row_of_choice) and (row_of_choice == -1).any()
    kept = row_of_choice >= 0
    assert torch.equal(rows[row_of_choice[kept]], tokens.repeat_interleave(kept.sum(1), 0))
    assert (rows[-4:] == 0).all() and torch.equal(
        rows, combine_kernels.copy_rows(tokens, row_of_choice, len(rows), True)
    )


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts, device=DEVICE).cumsum(0, dtype=torch.int32)


def test_every_row_of_every_expert_is_in_one_tile():
    for counts in ([0, 300, 1, 0, 128, 129], [5], [0, 0], [256], [1] * 40):
        tiles = grouped.find_tiles(ends_of(counts), sum(counts)).tolist()
        expected, start = [], 0
        for expert, count in enumerate(counts):
            expected += [(expert, start + row, start + count) for row in range(0, count, grouped.TILE_ROWS)]
            start += count
        listed = list(zip(*tiles, strict=True))
        assert listed[: len(expected)] == expected
        assert all(expert == -1 for expert, _, _ in listed[len(expected) :])


# counts, inner size, columns
PRODUCTS = [([0, 0], 8, 8), ([1], 1, 1), ([3, 0, 130, 7], 33, 20), ([128, 1], 64, 136)]


def products(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([part @ weight for part, weight in zip(rows.split(counts), weights, strict=True)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts, inner, columns", PRODUCTS, ids=str)
def test_grouped_products_equal_a_product_an_expert(counts, inner, columns, dtype, transposed):
    rows, ends = random(sum(counts), inner, dtype=dtype), ends_of(counts)
    weights = random(len(counts), inner, columns, dtype=dtype)
    if transposed:
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    expected = products(rows.double(), weights.double(), counts)
    assert_rounded(grouped.matmul(rows, weights, ends), expected, size=40)
    other = random(sum(counts), columns, dtype=dtype, seed=1)
    parts = zip(rows.double().split(counts), other.double().split(counts), strict=True)
    expected = torch.stack([left.t() @ right for left, right in parts])
    assert_rounded(grouped.outer(rows, other, ends), expected, size=100)
    before = random(*expected.shape, dtype=dtype)
    added = grouped.outer(rows, other, ends, add_to=before.clone())
    assert_rounded(added, expected + before.double(), size=100)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts, hidden, width", [([3, 0, 130, 7], 40, 24), ([128, 1], 64, 136)], ids=str)
def test_gate_up_and_swiglu_in_one_kernel_equal_the_two(counts, hidden, width, dtype, descriptors, monkeypatch):
    if triton.interpreting():
        monkeypatch.setattr(grouped, "capability", lambda device: (9, 0) if descriptors else (8, 0))
    rows, scale = random(sum(counts), hidden, dtype=dtype), random(sum(counts))
    weights = random(len(counts), 2, width, hidden, dtype=dtype)
    expected = products(rows.double(), weights.double().flatten(1, 2).transpose(1, 2), counts)
    gate, up = expected.chunk(2, dim=1)
    gated = torch.nn.functional.silu(gate) * up
    out, gate_up = grouped.gate_up_swiglu(rows, weights, scale, ends_of(counts))
    assert gate_up is not None
    assert_rounded(gate_up, expected, size=40)
    assert_rounded(out, gated * scale.double().unsqueeze(1), size=400)
    out, gate_up = grouped.gate_up_swiglu(rows, weights, None, ends_of(counts), keep=False)
    assert gate_up is None
    assert_rounded(out, gated, size=400)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_operations_and_their_gradients_equal_the_reference(dtype, on_device):
    numbers = [3, 0, 40, 7]
    counts = torch.tensor(numbers, device=DEVICE) if on_device else numbers
    rows, scale = random(50, 16, dtype=dtype), random(50)
    weights = random(4, 2, 24, 16, dtype=dtype) / 4
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2

    def product(rows: Tensor, weights: Tensor) -> Tensor:
        return products(rows, weights.flatten(1, 2).transpose(1, 2), numbers)

    def gated(rows: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        gate, up = product(rows, weights).chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up * scale.unsqueeze(1)

    assert_same_gradients(lambda rows, w: grouped_linear(rows, w, counts), product, [rows, weights], tolerance)
    given = [rows, weights, scale]
    assert_same_gradients(lambda rows, w, s: grouped_swiglu(rows, w, s, counts), gated, given, tolerance)


def test_a_store_gets_the_weight_gradient_of_every_microbatch():
    counts = torch.tensor([4, 0, 2], device=DEVICE)
    x, weights = random(6, 16).requires_grad_(), random(3, 2, 8, 16).requires_grad_()
    scale, down = random(6).requires_grad_(), random(3, 16, 8).requires_grad_()

    def loss(store: WeightGradientStore | None) -> Tensor:
        hidden = grouped_swiglu(x, weights, scale, counts, store)
        return grouped_linear(hidden, down, counts, store).square().sum()

    expected = torch.autograd.grad(loss(None), (weights, down))
    store = WeightGradientStore()
    for _ in range(2):
        loss(store).backward()
    for parameter, gradient in zip((weights, down), expected, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-5, atol=1e-4)


def test_a_rank_without_rows_gets_weight_gradients_of_zero():
    x, weights, scale = random(0, 16).requires_grad_(), random(3, 2, 8, 16).requires_grad_(), random(0).requires_grad_()
    out = grouped_swiglu(x, weights, scale, torch.zeros(3, dtype=torch.int64, device=DEVICE))
    gradients = torch.autograd.grad(out.sum(), (x, weights, scale))
    assert out.shape == (0, 8) and gradients[0].shape == (0, 16) and (gradients[1] == 0).all()


def test_the_same_bits_twice():
    results = []
    for _ in range(2):
        logits, bias, options = route_case((66, 60, 6, 4, 2), ("sigmoid", True))
        experts, weights, ranks, tile_counts, sums, _ = route.route(logits, bias, options)
        first_row, counts = permute.scan(tile_counts)
        rows, row_of_choice = permute.permute(random(66, 16), experts, ranks, first_row)
        out = combine_kernels.sum_rows(rows, row_of_choice, weights)
        grads = combine_kernels.weighted_backward(out, rows, row_of_choice, weights)
        results.append((experts, weights, sums, counts, out, *grads))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_that_drops_gives_the_same_where_the_host_does_not_know_how_many(recompute, monkeypatch):
    torch.manual_seed(0)
    config = MoEConfig(8, 2, 16, capacity_factor=0.6, recompute=recompute)
    layer = MoELayer(24, config, ParallelState.single_process(torch.device(DEVICE)), device=DEVICE)
    x, upstream = random(40, 24), random(40, 24, seed=1)
    results = []
    for known in (True, False):
        for module in (permute_operation, dispatcher):
            monkeypatch.setattr(module, "on_host", lambda tensor, known=known: known)
        given = x.clone().requires_grad_()
        out = layer(given, 20, 2)[0]
        gradients = torch.autograd.grad(out, (given, *layer.parameters()), upstream)
        results.append([out, *(getattr(gradient, "_local_tensor", gradient) for gradient in gradients)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS[:3], ids=str)
def test_route_and_permute_run_these_kernels_and_their_gradients(function, monkeypatch):
    monkeypatch.setattr(cuda, "library", None)
    results = []
    for used in (triton.takes, lambda *tensors, **dtypes: False):
        monkeypatch.setattr(triton, "takes", used)
        logits, _, options = route_case((70, 12, 3, 4, 2), function)
        logits, x = (logits * 4).round().div(4).requires_grad_(), random(70, 8).requires_grad_()
        choices = route_operation.route(logits, None, options)
        assert choices.first_row_NE.shape[0] == (1 if results else 2)  # the reference has one tile
        decided = choices.experts_TK, choices.ranks_TK, choices.counts_E
        rows, weights, row_map = permute_operation.permute(
            x, choices.weights_TK, *decided, first_row_NE=choices.first_row_NE
        )
        out = (rows.square() * weights.unsqueeze(1)).sum()
        gradients = torch.autograd.grad(out, (x, logits))
        results.append((rows, weights, row_map.row_of_choice, choices.counts_E, choices.score_sums_E, *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [None, [0, 1, 3], [2], []], ids=str)
@pytest.mark.parametrize("width", [1, 33, 300])
def test_the_two_passes_over_a_tile_of_logits(width, wanted, monkeypatch):
    for name in ("STATISTICS_BLOCK", "GRADIENT_BLOCK"):
        monkeypatch.setattr(policy_kernels, name, 64)
    logits, scale = 5 * random(4, width), 0.7
    targets = torch.tensor([0, width - 1, -1, width // 2]).to(DEVICE)
    merged = [merge(part.unsqueeze(0)) for part in (
        policy_kernels.statistics(logits, targets, scale),
        reference_statistics(logits.double(), targets, scale),
    )]  # fmt: skip
    for actual, expected in zip(*merged, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=4e-6)
    _, entropy, lse = merged[1]
    chosen = slice(None) if wanted is None else torch.tensor(wanted, dtype=torch.int64, device=DEVICE)
    vectors = [vector[chosen] for vector in (lse, entropy, *random(2, 4).double())]
    rows = RowGradients(None if wanted is None else chosen, targets[chosen], *vectors)
    expected = reference_gradient(logits.double()[chosen], rows, scale)
    given = logits, rows.rows_K, rows.targets_K, *(vector.float() for vector in vectors), scale
    for dtype in DTYPES:
        out = torch.empty(expected.shape, dtype=dtype, device=DEVICE)
        policy_kernels.gradient(*given, out)
        assert_rounded(out, expected, size=2)
    if wanted is None:
        policy_kernels.gradient(*given, logits)
        assert_rounded(logits, expected, size=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_head_equals_the_reference(dtype):
    hidden, weight = random(11, 6, dtype=dtype), random(40, 6, dtype=dtype)
    targets, advantages = torch.arange(11).to(DEVICE), random(11)
    advantages[::3] = 0
    mask = torch.arange(11, device=DEVICE) % 4 > 0

    def losses(log_probs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        return advantages[rows] * ((0.1 * log_probs).exp() + 0.2 * entropy)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return policy_head(hidden, weight, targets, losses, mask_T=mask, chunk=4).loss

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        return reference_policy_head(hidden, weight, targets, losses, mask_T=mask).loss

    given, wide = ([t.detach().to(to).requires_grad_() for t in (hidden, weight)] for to in (dtype, torch.float64))
    (actual, expected), tolerance = (head(*given), reference(*wide)), 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = zip(torch.autograd.grad(actual, given), torch.autograd.grad(expected, wide), strict=True)
    for gradient, wanted in gradients:
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)
