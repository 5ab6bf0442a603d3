"""The policy head: results and gradients of the plain softmax, with the products and the memory that it promises."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks.tensor_watch import TensorWatch
from r1mega.kernels import native, policy_tile
from r1mega.kernels.policy_head import policy_head, policy_log_probs, reference_policy_head
from r1mega.pipeline.weight_gradient import WeightGradientStore

T, H, V = 37, 6, 50
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


class Problem:
    """Random tokens; ``losses`` has a ratio, an entropy and, for every third token, no gradient at all.

    Args:
        dtype: of hidden states and weight.
        num_tokens: T.
        silent: every how many tokens one has no gradient; 0 for none.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, num_tokens: int = T, silent: int = 3) -> None:
        generator = torch.Generator().manual_seed(num_tokens)
        self.hidden = torch.randn(num_tokens, H, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
        self.targets = torch.randint(V, (num_tokens,), generator=generator)
        self.mask = torch.rand(num_tokens, generator=generator) < 0.6
        wide = torch.promote_types(dtype, torch.float32)
        self.advantages = (torch.randn(num_tokens, generator=generator) / T).to(wide)
        self.old = -torch.rand(num_tokens, generator=generator).to(wide) * 5
        if silent:
            self.advantages[::silent] = 0

    def losses(self, log_probs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        ratio = (0.1 * (log_probs - self.old[rows])).exp()
        return self.advantages[rows] * (ratio + 0.3 * entropy)

    def run(self, function: Callable = policy_head, **options) -> tuple[Tensor, ...]:
        """Loss, log-probabilities, entropy, and the gradients."""
        out = function(self.hidden, self.weight, self.targets, self.losses, **options)
        return out.loss, out.log_probs_T, out.entropy_T, *torch.autograd.grad(out.loss, (self.hidden, self.weight))


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 7, T, 1000, None])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_results_and_gradients_are_those_of_log_softmax(
    implementation, dtype, masked, temperature, chunk, monkeypatch
) -> None:
    monkeypatch.setattr(policy_tile, "TILE_ROWS", 4)
    p = Problem(dtype)
    options = {"mask_T": p.mask if masked else None, "temperature": temperature}
    assert_same(p.run(chunk=chunk, **options), p.run(reference_policy_head, **options), TOLERANCES[dtype])
    log_probs, entropy = policy_log_probs(p.hidden, p.weight, p.targets, chunk=chunk, **options)
    assert not log_probs.requires_grad
    assert_same((log_probs, entropy), p.run(reference_policy_head, **options)[1:3], TOLERANCES[dtype])


def test_bfloat16_is_multiplied_without_rounding_a_logit_and_gradients_are_rounded_once(implementation, monkeypatch):
    monkeypatch.setattr(policy_tile, "WEIGHT_ROWS", 16)
    p = Problem(torch.bfloat16)
    wide = Problem(torch.float32)
    wide.hidden, wide.weight = (tensor.detach().float().requires_grad_() for tensor in (p.hidden, p.weight))
    *results, grad_hidden, grad_weight = p.run(mask_T=p.mask, chunk=5)
    *expected, wanted_hidden, wanted_weight = wide.run(reference_policy_head, mask_T=p.mask)
    assert {value.dtype for value in results} == {torch.float32} and grad_weight.dtype == torch.bfloat16
    assert_same(tuple(results), tuple(expected), 1e-6)
    for gradient, wanted in ((grad_hidden, wanted_hidden), (grad_weight, wanted_weight)):
        torch.testing.assert_close(gradient.float(), wanted, rtol=1.01 * torch.finfo(torch.bfloat16).eps / 2, atol=1e-7)


def products_of(work: Callable[[], object]) -> list[tuple[int, int, int]]:
    with TensorWatch() as watch:
        work()
    return watch.products


def test_three_products_a_token_of_the_mask_and_one_for_a_token_without_gradient(implementation) -> None:
    p = Problem()
    counted = p.mask.sum().item()
    silent = (p.mask & (p.advantages == 0)).sum().item()
    assert 0 < silent < counted < T
    products = products_of(lambda: p.run(mask_T=p.mask, chunk=10))
    assert sum(rows for rows, inner, columns in products if (inner, columns) == (H, V)) == counted
    assert sum(rows for rows, inner, columns in products if (inner, columns) == (V, H)) == counted - silent
    assert sum(inner for rows, inner, columns in products if (rows, columns) == (V, H)) == counted - silent
    assert len(products) == 3 * -(-counted // 10)


def test_a_chunk_without_gradients_has_one_product_and_so_has_a_forward_without_a_graph() -> None:
    p = Problem()
    p.advantages.zero_()
    assert products_of(lambda: p.run(chunk=T)) == [(T, H, V)]
    assert not any(gradient.any() for gradient in p.run(chunk=T)[3:])
    p = Problem()
    with torch.no_grad():
        head = lambda: policy_head(p.hidden, p.weight, p.targets, p.losses, chunk=T)  # noqa: E731
        assert products_of(head) == [(T, H, V)] and not head().loss.requires_grad
    assert products_of(lambda: policy_log_probs(p.hidden, p.weight, p.targets, chunk=T)) == [(T, H, V)]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none_and_its_product_is_left_out(frozen: str) -> None:
    p = Problem()
    expected = dict(zip(("hidden", "weight"), p.run()[3:], strict=True))
    getattr(p, frozen).requires_grad_(False)
    other = "weight" if frozen == "hidden" else "hidden"
    found = []

    def work() -> None:
        loss = policy_head(p.hidden, p.weight, p.targets, p.losses, chunk=T).loss
        found.extend(torch.autograd.grad(loss, getattr(p, other)))

    assert len(products_of(work)) == 2
    torch.testing.assert_close(found[0], expected[other], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["no token", "none in the mask"])
def test_without_a_token_the_loss_and_all_gradients_are_zero(implementation, case: str) -> None:
    p = Problem(num_tokens=0 if case == "no token" else T)
    loss, log_probs, entropy, grad_hidden, grad_weight = p.run(mask_T=torch.zeros_like(p.mask))
    assert grad_hidden.shape == p.hidden.shape and grad_weight.shape == p.weight.shape
    assert not any(value.any() for value in (loss, log_probs, entropy, grad_hidden, grad_weight))


def test_what_stands_at_masked_tokens_has_no_influence(implementation) -> None:
    p, q = Problem(), Problem()
    q.targets[~q.mask] = -100
    q.advantages[~q.mask] = q.old[~q.mask] = torch.nan
    with torch.no_grad():
        q.hidden[~q.mask] = torch.nan
    for actual, expected in zip(q.run(mask_T=q.mask, chunk=9), p.run(mask_T=p.mask, chunk=9), strict=True):
        assert torch.equal(actual, expected)


def test_not_a_number_in_a_hidden_state_is_seen(implementation) -> None:
    p = Problem()
    with torch.no_grad():
        p.hidden[1] = torch.nan  # whose advantage is not 0
    loss, log_probs, *_ = p.run(chunk=5)
    assert loss.isnan() and log_probs.isnan().nonzero().tolist() == [[1]]


def test_the_backward_multiplies_by_the_gradient_that_comes_in_and_runs_once() -> None:
    p = Problem()
    expected = p.run()[3:]
    loss = policy_head(p.hidden, p.weight, p.targets, p.losses).loss
    (-2.5 * loss).backward(retain_graph=True)
    for tensor, wanted in zip((p.hidden, p.weight), expected, strict=True):
        torch.testing.assert_close(tensor.grad, -2.5 * wanted)
    with pytest.raises(AssertionError, match="runs once"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_store_s_weight_gradient_is_added_to_grad_in_the_backward_also_when_it_is_split(dtype: torch.dtype) -> None:
    p, store = Problem(dtype), WeightGradientStore()
    *_, expected = p.run()
    for count in (1, 2):
        loss = policy_head(p.hidden, p.weight, p.targets, p.losses, store=store).loss
        assert (p.weight.grad is None) == (count == 1)
        with store.deferred(0, 0):
            loss.backward()
        torch.testing.assert_close(p.weight.grad, count * expected)
        assert products_of(lambda: store.run(0, 0)) == []
        torch.testing.assert_close(p.weight.grad, count * expected)


def test_a_forward_that_is_computed_again_makes_the_gradient_once() -> None:
    p = Problem()
    expected = p.run()[3:]

    def loss(hidden: Tensor) -> Tensor:
        return policy_head(hidden, p.weight, p.targets, p.losses, chunk=T).loss

    products = products_of(lambda: checkpoint(loss, p.hidden, use_reentrant=True).backward())
    assert len(products) == 4
    assert_same((p.hidden.grad, p.weight.grad), expected, 1e-12)


def test_a_tied_weight_gets_both_gradients() -> None:
    p = Problem()
    ids = torch.arange(T) % V

    def tied(function: Callable) -> Tensor:
        hidden = torch.nn.functional.embedding(ids, p.weight)
        return torch.autograd.grad(function(hidden, p.weight, p.targets, p.losses).loss, p.weight)[0]

    torch.testing.assert_close(tied(policy_head), tied(reference_policy_head), rtol=1e-12, atol=1e-12)


def test_one_eighth_of_the_memory_of_the_plain_softmax(implementation) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocab = 512, 32, 2048
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocab, (tokens,), generator=generator)

    def peak(function: Callable, **options) -> int:
        with TensorWatch(hidden, weight, targets) as watch:
            loss = function(hidden, weight, targets, lambda log_probs, entropy, rows: log_probs, **options).loss
            torch.autograd.grad(loss, (hidden, weight))
        return watch.peak

    naive = peak(reference_policy_head)
    assert naive >= 4 * 4 * tokens * vocab
    assert peak(policy_head) <= naive / 8


MISTAKES = {
    "rows that differ": ({"targets": torch.zeros(T - 1, dtype=torch.int64)}, r"targets \[36\].*must be \[37\]"),
    "a mask of numbers": ({"mask": torch.ones(T)}, "mask .*torch.bool"),
    "two types": ({"hidden": torch.zeros(T, H)}, "hidden torch.float32, weight torch.float64"),
    "widths that differ": ({"hidden": torch.zeros(T, H + 1)}, r"must be \[T, H\] and \[V, H\]"),
    "temperature 0": ({"temperature": 0.0}, "temperature=0.0: must be positive"),
    "no chunk": ({"chunk": 0}, "chunk=0: must be at least 1"),
    "a target too large": ({"targets": torch.full((T,), V)}, "target 50: must be from 0 to 49"),
    "a negative target": ({"targets": torch.full((T,), -1)}, "target -1: must be from 0 to 49"),
    "one loss in all": ({"losses": lambda log_probs, entropy, rows: log_probs.sum()}, "one number for each of 37 rows"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_fits(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    p = Problem()
    given = {"hidden": p.hidden, "targets": p.targets, "losses": p.losses, "mask": None} | changes
    hidden, targets, losses, mask = (given.pop(name) for name in ("hidden", "targets", "losses", "mask"))
    with pytest.raises(ValueError, match=message):
        policy_head(hidden, p.weight, targets, losses, mask_T=mask, **given)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_shapes_and_types_are_known_without_numbers(device: str) -> None:
    def check(where: str) -> None:
        hidden, weight = (torch.empty(n, H, dtype=torch.bfloat16, device=where, requires_grad=True) for n in (T, V))
        targets = torch.empty(T, dtype=torch.int64, device=where)
        out = policy_head(hidden, weight, targets, lambda log_probs, entropy, rows: log_probs, mask_T=targets > 0)
        assert out.loss.shape == () and out.log_probs_T.shape == out.entropy_T.shape == (T,)
        assert out.loss.dtype == out.entropy_T.dtype == torch.float32
        gradients = torch.autograd.grad(out.loss, (hidden, weight))
        assert [(g.shape, g.dtype) for g in gradients] == [(hidden.shape, hidden.dtype), (weight.shape, weight.dtype)]

    if device == "meta":
        check("meta")
    else:
        with FakeTensorMode():
            check("cpu")


@pytest.mark.parametrize("size", [1.0, 300.0])
@pytest.mark.parametrize("width", [1, 33, 2048, 2049, 5000])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_cpp_passes_equal_the_reference_at_every_level(level: str, dtype: torch.dtype, width: int, size: float):
    generator = torch.Generator().manual_seed(width)
    logits = size * torch.randn(5, width, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, width - 1, -1, width // 2, -1])
    vectors = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-14
    logits = logits.to(dtype)
    found = policy_tile.statistics(logits, targets, 0.7)
    wanted = policy_tile.reference_statistics(logits.double(), targets, 0.7)
    # one logit's rounding is an error of this size in whatever is a difference of logits
    error = tolerance * max(1.0, size / 10)
    expected = policy_tile.merge(wanted.unsqueeze(0))
    for value, one in zip(policy_tile.merge(found.unsqueeze(0)), expected, strict=True):
        torch.testing.assert_close(value.double(), one, rtol=10 * error, atol=error)
    _, entropy, lse = expected
    for rows in (None, torch.tensor([0, 1, 4]), torch.tensor([2, 3]), torch.tensor([4])):
        chosen = slice(None) if rows is None else rows
        given = [targets, lse, entropy, *vectors]
        double = policy_tile.RowGradients(rows, *(vector[chosen] for vector in given))
        single = policy_tile.RowGradients(rows, targets[chosen], *(v[chosen].to(dtype) for v in given[1:]))
        gradients = policy_tile.reference_gradient(logits.double()[chosen], double, 0.7)
        actual = policy_tile.gradient(logits.clone(), single, 0.7, dtype)
        torch.testing.assert_close(actual.double(), gradients, rtol=10 * error, atol=error)


@pytest.mark.needs_extension
def test_the_number_of_threads_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(64, 10000, generator=torch.Generator().manual_seed(0))
    targets, rows = torch.arange(64), torch.arange(1, 64, 2)
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(
            native, "torch", SimpleNamespace(**(vars(torch) | {"get_num_threads": lambda n=threads: n}))
        )
        found = policy_tile.statistics(logits, targets, 1.0)
        _, entropy, lse = policy_tile.merge(found.unsqueeze(0))
        of = policy_tile.RowGradients(rows, *(v[rows] for v in (targets, lse, entropy, lse, entropy)))
        results.append((found, policy_tile.gradient(logits.clone(), of, 1.0, logits.dtype)))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))
