"""The CUDA sources, compiled for the CPU with fibres for threads, equal the reference; and this finds mistakes."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1mega.kernels import cuda
from r1mega.kernels.combine import combine
from r1mega.kernels.permute import permute
from r1mega.kernels.route import (
    TILE_TOKENS,
    Choices,
    RouteOptions,
    choose_experts,
    rank_choices,
    reference_rank_choices,
    reference_route,
    route,
)
from r1mega.kernels.scan import reference_scan, scan
from tests.gpu import routing
from tests.gpu.routing import FUNCTIONS, options_of, ranks_over_all_tokens
from tests.unit.cuda_host import ROOT, SEED, SOURCES, compile_host, random, stepped, use
from tests.unit.cuda_host_mutants import MUTANTS, check
from tests.unit.random_routes import random_route


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda_host") / "host.so"
    compile_host(SOURCES / "kernels.cu", path, "-O1", "-fPIC", "-shared")
    return path


@pytest.fixture(params=["0", "1", "2"])
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs with each order of threads."""
    monkeypatch.setenv(SEED, request.param)
    return request.param


@pytest.fixture
def host(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run on CPU tensors."""
    use(library, monkeypatch.setattr)


# tokens, experts, choices, groups, kept groups: each number of experts a lane, groups that fill lanes in part
SIZES = [
    (0, 8, 2, 1, 1), (1, 1, 1, 1, 1), (70, 8, 8, 4, 4), (130, 16, 2, 4, 2), (65, 60, 4, 1, 1), (300, 64, 6, 8, 3),
    (64, 160, 6, 8, 3), (200, 256, 8, 8, 4), (40, 384, 16, 12, 4), (66, 384, 8, 1, 1), (30, 378, 16, 9, 3),
    (20, 33, 16, 3, 2), (10, 31, 3, 31, 5),
]  # fmt: skip


def assert_equal(actual: Choices, expected: Choices) -> None:
    routing.assert_equal(actual, expected, 1e-5)
    assert torch.equal(actual.first_row_NE[:1], expected.first_row_NE)
    assert actual.first_row_NE.shape[0] == max(1, math.ceil(len(actual.experts_TK) / TILE_TOKENS))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_route_decides_as_the_reference_where_many_values_are_equal(size, schedule):
    for seed, function in enumerate(FUNCTIONS):
        if function[0] == "softmax" and seed != 2 + int(schedule) % 2:
            continue
        (logits, bias), options = stepped(size[:2], seed), options_of(size, function)
        given = bias if seed % 2 == 0 else None
        if function[0] == "softmax":
            given = None  # with a bias, values that differ by a rounding error could be chosen otherwise
        assert_equal(route(logits, given, options), reference_route(logits, given, options))


@pytest.mark.usefixtures("host")
def test_route_of_many_tiles_decides_as_the_reference():
    (logits, bias), options = stepped((5000, 32)), RouteOptions(4)
    assert_equal(route(logits, bias, options), reference_route(logits, bias, options))


RANDOM = {seed: None for seed in range(40)} | {40: (4990, 384, 16, 12, 4), 41: (1000, 384, 8, 1, 1)}


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("seed", RANDOM)
def test_at_random_sizes_route_decides_as_the_reference_also_where_logits_are_not_finite(seed):
    case = random_route(seed, most_tokens=200, kinds=("with ties", "not finite"), size=RANDOM[seed])
    given = case.logits_TE, case.bias_E, case.options
    assert cuda.takes_route(*given), case.name
    assert_equal(route(*given), reference_route(*given))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("function", FUNCTIONS[::2], ids=str)
@pytest.mark.parametrize(
    "size", [(70, 16, 2, 4, 2), (20, 160, 6, 8, 3), (20, 256, 8, 8, 4), (9, 384, 16, 1, 1)], ids=str
)
def test_route_chooses_from_its_own_scores_as_the_reference_does(size, function):
    """Scores of random logits differ by a rounding error between exponentials; the choice among them must not."""
    logits, bias, options = random(*size[:2]), random(size[1]) * 0.3, options_of(size, function)
    scores = own_scores(logits, options)
    choices, expected = route(logits, bias, options), choose_experts(scores, bias, options)
    assert torch.equal(choices.experts_TK, expected)
    ranks, counts = reference_rank_choices(expected, size[1])
    assert torch.equal(choices.counts_E, counts) and torch.equal(ranks_over_all_tokens(choices), ranks)
    chosen = scores.gather(1, expected)
    weights = chosen / (chosen.sum(1, keepdim=True) + 1e-20) * options.factor
    torch.testing.assert_close(choices.weights_TK, weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(scores, reference_scores(logits, options), rtol=1e-6, atol=1e-37)


def own_scores(logits: Tensor, options: RouteOptions) -> Tensor:
    """All scores as the kernel computes them: weights that are not divided, 16 experts at a time."""
    scores = torch.empty_like(logits)
    num_experts = logits.shape[1]
    for first in range(0, num_experts, 16):
        wanted = torch.zeros(num_experts)
        wanted[first : first + 16] = 1000.0
        part = RouteOptions(min(16, num_experts - first), options.score_function, normalize=False)
        chosen = route(logits, wanted, part)
        scores.scatter_(1, chosen.experts_TK, chosen.weights_TK)
    return scores


def reference_scores(logits: Tensor, options: RouteOptions) -> Tensor:
    return logits.sigmoid() if options.score_function == "sigmoid" else logits.softmax(1)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_nan_is_chosen_first_and_infinities_are_the_greatest_and_least(function, groups, schedule):
    logits = stepped((9, 40))[0]
    logits[0, 5] = math.nan
    logits[1] = math.nan
    logits[2, 33] = -math.nan
    logits[3, 7] = math.inf
    logits[4, ::2] = -math.inf
    logits[5] = -math.inf
    logits[6, 1::2] = math.inf
    logits[7] = 0.0
    bias = torch.zeros(40)
    bias[11], bias[12] = math.inf, -math.inf
    options = RouteOptions(6, function, *groups)
    for given in (None, bias):
        assert_equal(route(logits, given, options), reference_route(logits, given, options))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
@pytest.mark.parametrize("size", [(70, 24, 4, 4, 2), (0, 8, 2, 1, 1), (33, 384, 16, 1, 1)], ids=str)
def test_the_gradient_of_the_weights_is_the_reference_s(size, function, schedule):
    gradients = []
    for decide in (route, reference_route):
        logits, bias = stepped(size[:2])
        choices = decide(
            logits.requires_grad_(), None if function[0] == "softmax" else bias, options_of(size, function)
        )
        gradients.append(torch.autograd.grad(choices.weights_TK, logits, random(size[0], size[2]))[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("host")
def test_scores_are_given_where_they_are_asked_for_and_carry_a_gradient():
    logits = random(70, 16).requires_grad_()
    assert route(logits, None, RouteOptions(2)).scores_TE is None
    scores = route(logits, None, RouteOptions(2), with_scores=True).scores_TE
    assert torch.equal(scores, logits.sigmoid()) and scores.requires_grad


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    "num_tokens, top_k, num_experts", [(0, 2, 4), (1, 1, 1), (65, 3, 5), (300, 8, 384), (130, 20, 40)]
)
def test_choices_made_elsewhere_are_ranked_as_by_the_reference(num_tokens, top_k, num_experts, schedule):
    experts = random(num_tokens, num_experts).topk(top_k).indices
    experts[::3, ::2] = num_experts
    (ranks, counts), (expected, expected_counts) = (
        rank(experts, num_experts) for rank in (rank_choices, reference_rank_choices)
    )
    kept = experts < num_experts
    assert torch.equal(ranks[kept], expected[kept]) and torch.equal(counts, expected_counts)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("num_tiles, num_experts", [(1, 1), (1, 384), (2, 33), (70, 40), (32, 64), (100, 384)])
def test_scan_finds_the_first_rows_that_the_reference_finds(num_tiles, num_experts, schedule, monkeypatch):
    tile_counts = random(num_tiles, num_experts).abs().mul(20).int()
    for sums in (None, random(num_tiles, num_experts)):
        expected = reference_scan(tile_counts, sums)
        with monkeypatch.context() as without_reference:
            without_reference.setattr("r1mega.kernels.scan.reference_scan", None)
            first_row, counts, summed = scan(tile_counts, sums)
        assert torch.equal(first_row, expected[0]) and torch.equal(counts, expected[1])
        assert first_row.dtype == counts.dtype == torch.int64
        if sums is None:
            assert summed is None
        else:
            torch.testing.assert_close(summed, expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("host")
def test_integers_of_other_types_are_made_int64_or_refused_before_their_address_is_taken():
    experts = random(130, 9).topk(3).indices
    ranks, counts = rank_choices(experts.int(), 9)
    expected = reference_rank_choices(experts, 9)
    assert torch.equal(ranks, expected[0]) and torch.equal(counts, expected[1])
    x, weights = random(130, 4), torch.ones(130, 3)
    rows, _, row_map = permute(x, weights, experts.int(), ranks.int(), counts.int())
    torch.testing.assert_close(combine(rows, row_map), 3 * x)
    first_row = scan(counts.unsqueeze(0))[0]
    for wrong in (experts.int(), experts.t().contiguous().t()):
        with pytest.raises(ValueError, match="experts: must be dense and torch.int64"):
            cuda.rank(wrong, 9)
        with pytest.raises(ValueError, match="experts: must be dense and torch.int64"):
            cuda.permute(x, wrong, ranks, first_row)
        with pytest.raises(ValueError, match="row_of_choice: must be dense and torch.int64"):
            cuda.copy_rows(x, wrong, 390)
    with pytest.raises(ValueError, match="tile_counts: must be dense and torch.int32"):
        cuda.scan(counts.unsqueeze(0))


# bytes of a row from 1 to several parts of a warp; each size of piece
ROWS = [
    (torch.float32, 1), (torch.float32, 33), (torch.float32, 1030), (torch.bfloat16, 7), (torch.bfloat16, 2056),
    (torch.float64, 5), (torch.uint8, 13), (torch.float32, 0),
]  # fmt: skip


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("dtype, width", ROWS, ids=str)
def test_permute_puts_each_token_where_the_reference_puts_it(dtype, width, schedule):
    size = 150, 16, 3, 4, 2
    choices = route(*stepped(size[:2]), options_of(size, FUNCTIONS[0]))
    tokens = torch.arange(150 * width).remainder(251).view(150, width).to(dtype)
    rows, row_of_choice = cuda.permute(tokens, choices.experts_TK, choices.ranks_TK, choices.first_row_NE)
    order = choices.experts_TK.flatten().argsort(stable=True)
    assert torch.equal(rows, tokens[order // 3])
    assert torch.equal(row_of_choice.flatten()[order], torch.arange(450))
    assert torch.equal(cuda.copy_rows(tokens, row_of_choice, 450), rows)
    for gap in (1, 16):  # pieces of a row's own size, and smaller ones
        apart = torch.full((150, width + gap), 3, dtype=dtype)[:, :width].copy_(tokens)
        found = cuda.permute(apart, choices.experts_TK, choices.ranks_TK, choices.first_row_NE)
        assert torch.equal(found[0], rows) and torch.equal(cuda.copy_rows(apart, row_of_choice, 450), rows)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("kind", ["whole", "dropped", "padded", "counted over all tokens"])
@pytest.mark.parametrize("num_tokens", [0, 1, 150])
def test_permute_and_combine_and_their_gradients_equal_the_reference(num_tokens, kind, monkeypatch):
    size = num_tokens, 16, 3, 4, 2
    choices = route(*stepped(size[:2]), options_of(size, FUNCTIONS[0]))
    experts, ranks, counts, first_row = (
        choices.experts_TK, choices.ranks_TK, choices.counts_E, choices.first_row_NE,
    )  # fmt: skip
    kinds = {"dropped": {"may_drop": True}, "padded": {"capacity": int(counts.max()) + 2}}
    if kind in ("dropped", "counted over all tokens"):
        if kind == "dropped":
            experts[::3, ::2] = 16
        (ranks, counts), first_row = rank_choices(experts, 16), None
    results = []
    for library in (cuda.library, None):
        monkeypatch.setattr(cuda, "library", library)
        x, weights = (random(num_tokens, n).requires_grad_() for n in (20, 3))
        rows, row_weights, row_map = permute(
            x, weights, experts, ranks, counts, **kinds.get(kind, {}), first_row_NE=first_row
        )
        if kind == "padded":
            assert torch.equal(row_map.row_of_choice // kinds["padded"]["capacity"], experts)
        out = combine(rows * row_weights.unsqueeze(1), row_map)
        gradients = torch.autograd.grad(out, (x, weights), random(num_tokens, 20, seed=1))
        results.append((rows, row_weights, row_map.row_of_choice, out, *gradients))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("host")
def test_the_same_bits_whatever_the_order_of_threads(monkeypatch):
    results = []
    for seed in ("0", "0", "5", "6"):
        monkeypatch.setenv(SEED, seed)
        logits = random(200, 64).requires_grad_()
        choices = route(logits, random(64) * 0.3, RouteOptions(6, "softmax", 8, 3, normalize=False))
        grad = torch.autograd.grad(choices.weights_TK.sin().sum(), logits)[0]
        results.append((choices.experts_TK, choices.weights_TK, choices.ranks_TK, choices.score_sums_E, grad))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("host")
def test_sizes_without_room_in_the_kernels_tables_run_the_reference():
    fits = lambda num_experts, **given: cuda.takes_route(  # noqa: E731
        torch.zeros(2, num_experts), None, RouteOptions(**{"top_k": 2} | given)
    )
    assert fits(384) and fits(384, top_k=16, num_groups=32, top_k_groups=4)
    assert not fits(385) and not fits(384, top_k=17) and not fits(66, num_groups=33) and not fits(10, num_groups=3)
    assert not cuda.takes_route(torch.zeros(2, 8, dtype=torch.float64), None, RouteOptions(2))
    assert not cuda.takes_route(torch.zeros(2, 8, device="meta"), None, RouteOptions(2))
    assert route(random(5, 400), None, RouteOptions(20)).experts_TK.shape == (5, 20)
    decided = torch.arange(40).repeat(3, 1), *rank_choices(torch.arange(40).repeat(3, 1), 40)
    rows, _, row_map = permute(random(3, 4), torch.ones(3, 40), *decided)
    torch.testing.assert_close(combine(rows, row_map), random(3, 4) * 40)


@pytest.mark.usefixtures("host")
def test_torch_compile_traces_the_reference(monkeypatch):
    monkeypatch.setattr(cuda, "_call", None)  # an error if a kernel ran
    compiled = torch.compile(lambda logits: route(logits, None, RouteOptions(2)).weights_TK, backend="eager")
    logits = random(5, 8)
    torch.testing.assert_close(compiled(logits), reference_route(logits, None, RouteOptions(2)).weights_TK)


@pytest.mark.usefixtures("host")
def test_a_kernel_that_fails_is_an_error_with_its_name():
    with pytest.raises(RuntimeError, match="CUDA kernel route failed"):
        cuda.route(torch.zeros(2, 8), None, RouteOptions(9))


def test_no_address_outside_and_nothing_undefined_at_any_size(tmp_path):
    program = tmp_path / "sizes"
    flags = "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}"
    compile_host(Path(__file__).with_name("cuda_host_sizes.cpp"), program, *flags)
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", SEED: "3"}
    run = subprocess.run([program], env=os.environ | options, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout == "all sizes are right\n", run.stdout + run.stderr[-3000:]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What finds each mutant."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = [sys.executable, "-m", "tests.unit.cuda_host_mutants", str(tmp_path_factory.mktemp("mutants"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_found(name, found):
    assert found[name]


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("kernel", ["route", "rank", "scan", "permute", "route_backward"])
def test_without_a_mistake_the_same_checks_pass(kernel, schedule):
    check(kernel)


def test_mutants_are_distinct() -> None:
    texts = [(kernel, correct, index) for kernel, correct, _, index in MUTANTS.values()]
    assert all(a != b for a, b in itertools.combinations(texts, 2))
