"""The Triton kernels on a GPU: what the unit tests say of them, sizes of R1, and no waiting for the host.

In Triton's interpreter the same tests run at sizes that it has done with in a second: ``test_kernels_triton.py``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from r1mega.kernels import triton

if not triton.available():
    pytest.skip(f"no Triton kernels here: {triton.reason()}", allow_module_level=True)

from r1mega.kernels.grouped_swiglu import grouped_swiglu
from r1mega.kernels.linear import grouped_linear
from r1mega.kernels.policy_head import policy_head, reference_policy_head
from r1mega.kernels.route import RouteOptions, reference_route
from r1mega.kernels.triton import combine as combine_kernels
from r1mega.kernels.triton import permute as permute_kernels
from r1mega.kernels.triton import route as route_kernels
from tests.gpu.routing import no_wait
from tests.unit.triton_cases import *  # noqa: F403
from tests.unit.triton_cases import DEVICE

ON_GPU = DEVICE == "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def size(on_gpu: int, interpreted: int) -> int:
    return on_gpu if ON_GPU else interpreted


def no_waiting() -> AbstractContextManager:
    return no_wait() if ON_GPU else nullcontext()


def random_on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("num_tokens", [size(8192, 64), size(5000, 70)])
def test_a_layer_of_r1_is_routed_permuted_and_combined_as_by_the_reference(num_tokens: int) -> None:
    options = RouteOptions(8, "sigmoid", 8, 4, factor=2.5)
    logits, tokens = random_on_gpu(num_tokens, 256, dtype=torch.float32), random_on_gpu(num_tokens, size(7168, 20))
    bias = 0.1 * random_on_gpu(256, dtype=torch.float32)

    def whole() -> tuple[torch.Tensor, ...]:
        experts, weights, ranks, tile_counts, _, _ = route_kernels.route(logits, bias, options)
        first_row, counts = permute_kernels.scan(tile_counts)
        rows, row_of_choice = permute_kernels.permute(tokens, experts, ranks, first_row)
        out = combine_kernels.sum_rows(rows, row_of_choice, weights)
        gradients = combine_kernels.weighted_backward(tokens, rows, row_of_choice, weights)
        return experts, weights, counts, row_of_choice, out, *gradients

    first = whole()
    with no_waiting():
        again = whole()
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    experts, weights, counts, row_of_choice, out, grad_rows, grad_weights = first
    expected = reference_route(logits, bias, options)
    assert torch.equal(experts, expected.experts_TK) and torch.equal(counts, expected.counts_E)
    torch.testing.assert_close(weights, expected.weights_TK, rtol=1e-6, atol=1e-6)
    assert torch.equal(row_of_choice, (counts.cumsum(0) - counts)[experts] + expected.ranks_TK)
    # Each row is a copy of its token, so the sum is the token times the sum of its weights, and so on.
    wide = tokens.float()
    torch.testing.assert_close(out.float(), wide * weights.sum(1, keepdim=True), rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(grad_weights, wide.square().sum(1, keepdim=True).expand(-1, 8), rtol=1e-4, atol=1e-3)
    for k in (0, 7):
        torch.testing.assert_close(
            grad_rows[row_of_choice[:, k]].float(), wide * weights[:, k : k + 1], rtol=8e-3, atol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_grouped_products_of_a_large_layer_equal_products_an_expert(dtype: torch.dtype) -> None:
    numbers = [(expert * 37) % 11 * size(100, 1) for expert in range(16)]
    num_rows, hidden, width = sum(numbers), size(2048, 24), size(768, 16)
    counts = torch.tensor(numbers, device=DEVICE)
    rows = random_on_gpu(num_rows, hidden, dtype=dtype).requires_grad_()
    gate_up = (random_on_gpu(16, 2, width, hidden, dtype=dtype) / hidden**0.5).requires_grad_()
    down = (random_on_gpu(16, hidden, width, dtype=dtype) / width**0.5).requires_grad_()
    scale, upstream = random_on_gpu(num_rows, dtype=torch.float32), random_on_gpu(num_rows, hidden, dtype=dtype)

    def whole() -> tuple[torch.Tensor, ...]:
        out = grouped_linear(grouped_swiglu(rows, gate_up, scale, counts), down, counts)
        return out.detach(), *torch.autograd.grad(out, (rows, gate_up, down), upstream)

    first = whole()
    with no_waiting():
        again = whole()
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    wide = [tensor.detach().double().requires_grad_() for tensor in (rows, gate_up, down)]
    parts = []
    for x, both, out_weight, s in zip(wide[0].split(numbers), wide[1], wide[2], scale.split(numbers), strict=True):
        hidden_part = torch.nn.functional.silu(x @ both[0].t()) * (x @ both[1].t()) * s.double().unsqueeze(1)
        parts.append(hidden_part @ out_weight.t())
    expected = torch.cat(parts)
    references = expected.detach(), *torch.autograd.grad(expected, wide, upstream.double())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for actual, wanted in zip(first, references, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("triton_runs", [True, False])
def test_the_policy_head_at_the_vocabulary_of_r1_equals_the_reference_in_float32(triton_runs, monkeypatch) -> None:
    if not triton_runs:
        monkeypatch.setattr(triton, "takes", lambda *tensors: False)
    num_tokens = size(300, 10)
    hidden, weight = random_on_gpu(num_tokens, 512), random_on_gpu(size(129280, 1280), 512) / 16
    targets = torch.arange(num_tokens, device=DEVICE) * size(400, 100)
    advantages = random_on_gpu(num_tokens, dtype=torch.float32)
    advantages[::3] = 0

    def losses(log_probs: torch.Tensor, entropy: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return advantages[rows] * ((0.1 * log_probs).exp() + 0.2 * entropy)

    given, wide = (
        [t.detach().to(to).requires_grad_() for t in (hidden, weight)] for to in (hidden.dtype, torch.float64)
    )
    actual = policy_head(*given, targets, losses, chunk=size(128, 4))
    expected = reference_policy_head(*wide, targets, losses)
    for name in ("log_probs_T", "entropy_T"):
        torch.testing.assert_close(getattr(actual, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-4)
    gradients = torch.autograd.grad(actual.loss, given), torch.autograd.grad(expected.loss, wide)
    for gradient, wanted in zip(*gradients, strict=True):
        assert float((gradient.double() - wanted).norm() / wanted.norm()) < 5e-3
