"""Operations on tensors that have a shape and no numbers: results and gradients have the right shapes and types."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from r1mega.config import MoEConfig
from r1mega.kernels.attention import causal_attention
from r1mega.kernels.combine import combine
from r1mega.kernels.fake import is_fake
from r1mega.kernels.grouped_swiglu import grouped_swiglu
from r1mega.kernels.linear import grouped_linear, linear, linears
from r1mega.kernels.overview import OPERATIONS, Operation
from r1mega.kernels.parameter import local
from r1mega.kernels.permute import RowMap, permute
from r1mega.kernels.policy_head import policy_head, policy_log_probs
from r1mega.kernels.rms_norm import rms_norm
from r1mega.kernels.rotate import rotate
from r1mega.kernels.route import RouteOptions, rank_choices, route
from r1mega.kernels.scan import scan
from r1mega.kernels.swiglu import swiglu, weighted_swiglu
from r1mega.moe.layer import MoELayer
from r1mega.parallel_state import ParallelState

BF16, F32, I64, I32 = torch.bfloat16, torch.float32, torch.int64, torch.int32


@pytest.fixture(params=["meta", "fake"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are made; under the fake mode those of the CPU have no numbers."""
    with FakeTensorMode() if request.param == "fake" else nullcontext():
        yield "meta" if request.param == "meta" else "cpu"


@pytest.fixture(scope="module")
def state() -> ParallelState:
    """Made before ``device``: a mesh needs numbers."""
    return ParallelState.single_process()


class Made:
    """Tensors without numbers on one device; those of floating-point types want a gradient."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        return torch.empty(shape, dtype=dtype, device=self.device, requires_grad=dtype.is_floating_point)

    def map(self, num_rows: int = 14) -> RowMap:
        return RowMap(self(5, 3, dtype=I64), num_rows, dropped=True, padded=True)


def check(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *inputs: Tensor) -> None:
    assert is_fake(out) and out.shape == shape and out.dtype == dtype
    gradients = torch.autograd.grad(out, inputs, torch.empty_like(out), retain_graph=True) if inputs else ()
    for given, gradient in zip(inputs, gradients, strict=True):
        assert is_fake(local(gradient)) and gradient.shape == given.shape and gradient.dtype == given.dtype


def check_route(made: Made) -> None:
    logits, bias = made(70, 12, dtype=F32), torch.empty(12, device=made.device)
    for function, normalize in (("sigmoid", True), ("softmax", True), ("softmax", False)):
        options = RouteOptions(3, function, 4, 2, normalize)
        for given in (bias, None):
            choices = route(logits, given, options, with_scores=True)
            check(choices.weights_TK, (70, 3), F32, logits)
            check(choices.scores_TE, (70, 12), F32, logits)
            check(choices.experts_TK, (70, 3), I64)
            check(choices.ranks_TK, (70, 3), I64)
            check(choices.counts_E, (12,), I64)
            check(choices.first_row_NE, (1, 12), I64)
            check(choices.score_sums_E, (12,), F32)


def check_rank_choices(made: Made) -> None:
    for dtype in (I64, I32):
        ranks, counts = rank_choices(made(70, 3, dtype=dtype), 12)
        check(ranks, (70, 3), I64)
        check(counts, (12,), I64)


def check_scan(made: Made) -> None:
    for num_tiles in (1, 3):
        first_row, counts, sums = scan(made(num_tiles, 12, dtype=I32), made(num_tiles, 12, dtype=F32))
        check(first_row, (num_tiles, 12), I64)
        check(counts, (12,), I64)
        check(sums, (12,), F32)


def check_permute(made: Made) -> None:
    x, weights = made(70, 6), made(70, 3, dtype=F32)
    decided = made(70, 3, dtype=I64), made(70, 3, dtype=I64), made(12, dtype=I64)
    kinds = (
        ({}, 210), ({"may_drop": True}, 210), ({"may_drop": True, "num_rows": 99}, 99), ({"capacity": 20}, 240),
        ({"first_row_NE": made(2, 12, dtype=I64)}, 210),
    )  # fmt: skip
    for options, num_rows in kinds:
        rows, row_weights, row_map = permute(x, weights, *decided, **options)
        check(rows, (num_rows, 6), made.dtype, x)
        check(row_weights, (num_rows,), F32, weights)
        check(row_map.row_of_choice, (70, 3), I64)
        assert row_map.num_rows == num_rows


def check_combine(made: Made) -> None:
    rows, weights, row_map = made(14, 6), made(5, 3, dtype=F32), made.map()
    check(combine(rows, row_map), (5, 6), made.dtype, rows)
    check(combine(rows, row_map, weights), (5, 6), made.dtype, rows, weights)


def check_swiglu(made: Made) -> None:
    gate, up = made(4, 8), made(4, 8)
    check(swiglu(gate, up), (4, 8), made.dtype, gate, up)


def check_weighted_swiglu(made: Made) -> None:
    both, scale = made(14, 16), made(14, dtype=F32)
    check(weighted_swiglu(both, scale), (14, 8), made.dtype, both, scale)


def check_grouped_swiglu(made: Made) -> None:
    rows, gate_up, scale = made(14, 6), made(3, 2, 8, 6), made(14, dtype=F32)
    for counts in ([4, 0, 10], made(3, dtype=I64)):
        check(grouped_swiglu(rows, gate_up, scale, counts), (14, 8), made.dtype, rows, gate_up, scale)


def check_rms_norm(made: Made) -> None:
    rows, gain = made(14, 6), made(6)
    check(rms_norm(rows, gain, 1e-6), (14, 6), made.dtype, rows, gain)


def check_rotate(made: Made) -> None:
    x, angles = made(2, 5, 3, 8), torch.empty(5, 4, dtype=made.dtype, device=made.device)
    for interleaved in (False, True):
        check(rotate(x, angles, angles, interleaved), (2, 5, 3, 8), made.dtype, x)


def check_linear(made: Made) -> None:
    rows, first, second = made(14, 6), made(5, 6), made(7, 6)
    check(linear(rows, first), (14, 5), made.dtype, rows, first)
    for out, width in zip(linears(rows, [first, second]), (5, 7), strict=True):
        check(out, (14, width), made.dtype, rows, first, second)


def check_grouped_linear(made: Made) -> None:
    rows, gate_up, down = made(14, 6), made(3, 2, 8, 6), made(3, 6, 8)
    for counts in ([4, 0, 10], made(3, dtype=I64)):
        check(grouped_linear(rows, gate_up, counts), (14, 16), made.dtype, rows, gate_up)
        check(grouped_linear(made(14, 8), down, counts), (14, 6), made.dtype, down)


def check_policy_head(made: Made) -> None:
    hidden, weight, targets = made(9, 6), made(20, 6), made(9, dtype=I64)
    for mask in (None, made(9, dtype=torch.bool)):
        found = policy_head(hidden, weight, targets, lambda log_probs, entropy, rows: -log_probs, mask_T=mask)
        check(found.log_probs_T, (9,), F32)
        check(found.entropy_T, (9,), F32)
        assert is_fake(found.loss) and found.loss.shape == () and found.loss.dtype == F32
        gradients = torch.autograd.grad(found.loss, (hidden, weight))
        assert [(gradient.shape, gradient.dtype) for gradient in gradients] == [
            (hidden.shape, made.dtype), (weight.shape, made.dtype),
        ]  # fmt: skip


def check_policy_log_probs(made: Made) -> None:
    for found in policy_log_probs(made(9, 6), made(20, 6), made(9, dtype=I64)):
        check(found, (9,), F32)


def check_causal_attention(made: Made) -> None:
    query, key, value = made(2, 4, 5, 8), made(2, 2, 5, 8), made(2, 2, 5, 6)
    for packed in (None, [2, 3]):
        out = causal_attention(query, key, value, 0.3, packed)
        check(out, (2, 4, 5, 6), made.dtype, query, key, value)


CHECKS: dict[str, Callable[[Made], None]] = {
    name.removeprefix("check_"): function for name, function in globals().items() if name.startswith("check_")
}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_shapes_and_types_of_every_operation_are_known_without_numbers(
    operation: Operation, device: str, dtype: torch.dtype
) -> None:
    assert operation.name in CHECKS, f"write check_{operation.name}"
    CHECKS[operation.name](Made(device, dtype))


LAYERS = {
    "dropless": {},
    "dropped": {"capacity_factor": 1.0},
    "padded": {"capacity_factor": 1.0, "pad_to_capacity": True},
    "recomputed": {"recompute": True, "num_shared_experts": 1},
    "with losses": {"aux_loss_coefficient": 0.1, "z_loss_coefficient": 0.1, "score_function": "softmax"},
    "balanced by force": {"force_balance": True, "num_groups": 1, "top_k_groups": 1},
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_whole_layer_runs_forward_and_backward_without_numbers(kind: str, state: ParallelState, device: str) -> None:
    groups = {"num_groups": 4, "top_k_groups": 2}
    config = MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=16, **(groups | LAYERS[kind]))
    layer = MoELayer(12, config, state, BF16, device)
    x = torch.empty(10, 12, dtype=BF16, device=device, requires_grad=True)
    out, losses = layer(x, 10, 1)
    assert len(losses) == 2 * (kind == "with losses")
    loss = sum(losses.values(), out.float().sum())
    check(out, (10, 12), BF16)
    check(loss, (), F32, x, *layer.parameters())


def exported(operation, *inputs: Tensor) -> Tensor:
    """What the program gives that ``torch.export`` records of an operation."""

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return operation(*inputs)

    return torch.export.export(Module(), inputs, strict=False).module()(*inputs)


def test_an_exported_program_computes_what_the_operation_does():
    experts = torch.tensor([[0, 1], [2, 0], [1, 2]])
    ranks, counts = rank_choices(experts, 3)
    x, weights, logits, w = torch.randn(3, 4), torch.rand(3, 2), torch.randn(3, 8), torch.randn(3, 5, 4)
    rows, _, row_map = permute(x, weights, experts, ranks, counts)
    for operation, inputs in (
        (lambda logits: route(logits, None, RouteOptions(2)).weights_TK, (logits,)),
        (lambda x: permute(x, weights, experts, ranks, counts)[0], (x,)),
        (lambda rows: combine(rows, row_map), (rows,)),
        (lambda rows, weights: combine(rows, row_map, weights), (rows, weights)),
        (lambda rows, w: grouped_linear(rows, w, [2, 2, 2]), (rows, w)),
    ):
        torch.testing.assert_close(exported(operation, *inputs), operation(*inputs))
