"""What other stacks give the operations: integers of every type, and what is wrong, for one clear error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1mega.kernels import native
from r1mega.kernels.combine import combine
from r1mega.kernels.grouped_swiglu import grouped_swiglu
from r1mega.kernels.linear import grouped_linear, linear, linears
from r1mega.kernels.permute import RowMap, copy_rows, permute
from r1mega.kernels.rms_norm import rms_norm
from r1mega.kernels.rotate import rotate
from r1mega.kernels.route import RouteOptions, rank_choices, route
from r1mega.kernels.scan import scan
from r1mega.kernels.swiglu import swiglu, weighted_swiglu
from r1mega.moe.dispatcher import AllToAllDispatcher, routing_of
from r1mega.parallel_state import ParallelState

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
T, K, E, H = 70, 3, 9, 4


def choices() -> Tensor:
    return torch.rand(T, E, generator=torch.Generator().manual_seed(0)).topk(K).indices


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_experts_may_be_integers_of_any_type_as_routers_of_other_stacks_give_them(dtype, implementation):
    experts = choices()
    expected = rank_choices(experts, E)
    ranks, counts = rank_choices(experts.to(dtype), E)
    assert torch.equal(ranks, expected[0]) and torch.equal(counts, expected[1])
    assert ranks.dtype == counts.dtype == torch.int64
    x, weights = torch.randn(T, H), torch.randn(T, K)
    (rows, row_weights, row_map), wanted = (
        permute(x, weights, *(part.to(of) for part in (experts, *expected))) for of in (dtype, torch.int64)
    )
    assert torch.equal(rows, wanted[0]) and torch.equal(row_weights, wanted[1])
    assert torch.equal(combine(rows, row_map), combine(*wanted[::2]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_the_dispatcher_takes_the_experts_of_another_router(dtype, implementation):
    x, weights, experts = torch.randn(T, H), torch.rand(T, K), choices()
    experts[5, 1] = E  # dropped
    dispatcher = AllToAllDispatcher(E, ParallelState.single_process().group("ep"))
    d = dispatcher.dispatch(x, routing_of(experts.to(dtype), weights, E), may_drop=True)
    assert d.rows is not None and d.weights is not None
    out = dispatcher.combine(d.rows * d.weights.unsqueeze(1), d)
    torch.testing.assert_close(out, x * weights.masked_fill(experts == E, 0).sum(1, keepdim=True))


def dispatcher_of(group: object = None, **options: str) -> AllToAllDispatcher:
    return AllToAllDispatcher(E, group or ParallelState.single_process().group("ep"), **options)


class ThreeRanks:
    """A process group as far as a dispatcher looks at it before a message is sent."""

    def size(self) -> int:
        return 3

    def rank(self) -> int:
        return 1


WRONG_DISPATCHES = {
    "tokens of three dimensions": ("hidden_TH: .*2 dimensions", torch.ones(T, H, 1), {}),
    "integers for tokens": ("hidden_TH: .*floating-point", torch.ones(T, H, dtype=torch.int64), {}),
    "other tokens than those routed": ("routing.experts_TK: .*shape", torch.ones(T - 1, H), {}),
    "a router of more experts": ("routing.counts_E: .*shape", torch.ones(T, H), {"num_experts": E + 3}),
    "no room for all": (r"padded_capacity=2: one expert has \d+ rows", torch.ones(T, H), {"padded_capacity": 2}),
}


@pytest.mark.parametrize("group", [None, ThreeRanks()], ids=["alone", "of three"])
@pytest.mark.parametrize("wrong", WRONG_DISPATCHES)
def test_the_dispatcher_refuses_before_it_sends(wrong, group):
    message, hidden, changes = WRONG_DISPATCHES[wrong]
    routing = routing_of(choices(), torch.ones(T, K), changes.get("num_experts", E))
    with pytest.raises(ValueError, match=message):
        dispatcher_of(group).dispatch(hidden, routing, padded_capacity=changes.get("padded_capacity"))


def test_a_dispatcher_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="wire=fp8: must be model, bfloat16 or float8"):
        dispatcher_of(wire="fp8")
    with pytest.raises(ValueError, match=r"num_experts=10: must be a multiple of the ranks of ep \(3\)"):
        AllToAllDispatcher(10, ThreeRanks())


def test_what_a_dispatcher_was_not_made_for_is_refused():
    routing, alone = routing_of(choices(), torch.ones(T, K), E), dispatcher_of()
    with pytest.raises(ValueError, match="keep_source=False"):
        _ = alone.dispatch(torch.ones(T, H), routing).rows_again
    with pytest.raises(ValueError, match="ep: has one rank"):
        alone.prepare_chunks(torch.ones(T, H), routing, 2)
    with pytest.raises(ValueError, match="num_chunks=0: must be at least 1"):
        dispatcher_of(ThreeRanks()).prepare_chunks(torch.ones(T, H), routing, 0)


@pytest.mark.parametrize(
    "message, experts, weights",
    [
        ("experts_TK: .*2 dimensions", choices()[0], torch.ones(K)),
        ("experts_TK: must be integers", torch.ones(T, K), torch.ones(T, K)),
        ("weights_TK: .*shape", choices(), torch.ones(T, K + 1)),
        ("weights_TK: .*floating-point", choices(), torch.ones(T, K, dtype=torch.int64)),
    ],
)
def test_routing_of_another_stack_is_refused_where_it_does_not_fit(message, experts, weights):
    with pytest.raises(ValueError, match=message):
        routing_of(experts, weights, E)


def test_experts_need_not_be_dense(implementation):
    experts = choices()
    strided = experts.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(rank_choices(strided, E)[0], rank_choices(experts, E)[0])
    ranks, counts = rank_choices(experts, E)
    x, weights = torch.randn(H, T).t(), torch.randn(K, T).t()
    rows, _, row_map = permute(x, weights, strided, ranks.t().contiguous().t(), counts)
    torch.testing.assert_close(combine(rows, row_map), K * x)
    torch.testing.assert_close(
        combine(rows.t().contiguous().t(), row_map, weights), x * weights.sum(1, keepdim=True), rtol=1e-5, atol=1e-5
    )


def given(**changes: Tensor | None) -> dict[str, Tensor | None]:
    """Right arguments of permute, and ``changes``."""
    experts = choices()
    ranks, counts = rank_choices(experts, E)
    right = {"experts_TK": experts, "ranks_TK": ranks, "counts_E": counts}
    return {"input_TH": torch.ones(T, H), "weights_TK": torch.ones(T, K), **right} | changes


integers = dict(dtype=torch.int64)
WRONG_PERMUTES = {
    "another type of experts": ("experts_TK: must be integers", {"experts_TK": torch.ones(T, K)}),
    "experts of other tokens": ("experts_TK: .*shape", {"experts_TK": torch.ones(T - 1, K, **integers)}),
    "experts of one dimension": ("experts_TK: .*2 dimensions", {"experts_TK": torch.ones(T, **integers)}),
    "experts on another device": ("experts_TK: .*meta", {"experts_TK": torch.ones(T, K, device="meta", **integers)}),
    "another type of ranks": ("ranks_TK: must be integers", {"ranks_TK": torch.ones(T, K)}),
    "ranks of fewer choices": ("ranks_TK: .*shape", {"ranks_TK": torch.ones(T, K - 1, **integers)}),
    "weights of fewer choices": ("weights_TK: .*shape", {"weights_TK": torch.ones(T, K - 1)}),
    "tokens of three dimensions": ("input_TH: .*2 dimensions", {"input_TH": torch.ones(T, H, 1)}),
    "counts of two dimensions": ("counts_E: .*1 dimension", {"counts_E": torch.ones(1, E, **integers)}),
    "one count": ("counts_E: .*1 dimension", {"counts_E": torch.tensor(T * K)}),
    "no room for all rows of an expert": (r"capacity=20: one expert has \d+ rows", {"capacity": 20}),
    "another type of counts": ("counts_E: must be integers", {"counts_E": torch.ones(E)}),
    "first rows of other tiles": ("first_row_NE: .*3 tiles", {"first_row_NE": torch.ones(3, E, **integers)}),
    "first rows of other experts": ("first_row_NE: .*shape", {"first_row_NE": torch.ones(1, E - 1, **integers)}),
}


@pytest.mark.parametrize("wrong", WRONG_PERMUTES)
def test_permute_refuses(wrong, implementation):
    message, changes = WRONG_PERMUTES[wrong]
    with pytest.raises(ValueError, match=message):
        permute(**given(**changes))


@pytest.mark.parametrize(
    "message, experts",
    [
        ("experts_TK: must be integers", torch.ones(T, K)),
        ("experts_TK: must be integers", torch.ones(T, K, dtype=torch.bool)),
        ("experts_TK: .*2 dimensions", torch.ones(T, **integers)),
    ],
)
def test_rank_choices_refuses(message, experts, implementation):
    with pytest.raises(ValueError, match=message):
        rank_choices(experts, E)


@pytest.mark.needs_extension
@pytest.mark.parametrize("expert", [-1, E + 1, 1 << 40])
def test_experts_that_do_not_exist_are_refused_where_the_kernel_would_write_outside_its_arrays(expert):
    experts = choices()
    ranks, counts = rank_choices(experts, E)
    experts[7, 2] = expert
    message = rf"experts_TK: expert {expert} \(choice 23\); they go from 0 to 8, and 9 marks"
    with pytest.raises(ValueError, match=message):
        rank_choices(experts, E)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="lead to rows outside of the 210"):
            permute(torch.ones(T, H, dtype=dtype), torch.ones(T, K), experts, ranks, counts)


@pytest.mark.needs_extension
def test_a_dropped_choice_is_refused_unless_choices_may_be_dropped():
    experts = choices()
    experts[7, 2] = E
    ranks, counts = rank_choices(experts, E)
    for x in (torch.ones(T, H), torch.ones(T, H).double()):
        with pytest.raises(ValueError, match="may_drop be True where choices are dropped"):
            permute(x, torch.ones(T, K), experts, ranks, counts)
        assert permute(x, torch.ones(T, K), experts, ranks, counts, may_drop=True)[0].shape == (T * K - 1, H)


@pytest.mark.needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_map_of_another_stack_that_leads_outside_of_the_rows_is_refused(dtype):
    rows_of = torch.arange(T * K).view(T, K)
    rows_of[40, 1] = T * K
    row_map, message = RowMap(rows_of, T * K), "row_of_choice: leads outside of the 210 rows"
    rows = torch.ones(T * K, H, dtype=dtype)
    for use in (
        lambda: copy_rows(torch.ones(T, H, dtype=dtype), row_map),
        lambda: combine(rows, row_map),
        lambda: combine(rows, row_map, torch.ones(T, K, dtype=dtype)),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.needs_extension
@pytest.mark.parametrize("rank", [-1000, 1000])
def test_ranks_that_lead_outside_the_rows_are_refused(rank):
    arguments = given()
    arguments["ranks_TK"][4, 0] = rank
    with pytest.raises(ValueError, match="rows outside"):
        permute(**arguments)


def test_rows_of_another_number_are_not_those_of_the_map(implementation):
    rows, _, row_map = permute(**given())
    for operation in (combine, lambda rows, row_map: combine(rows, row_map, torch.ones(T, K))):
        for wrong in (rows[:-1], rows.unsqueeze(0)):
            with pytest.raises(ValueError, match="rows_RH"):
                operation(wrong, row_map)
    with pytest.raises(ValueError, match="weights_TK: .*shape"):
        combine(rows, row_map, torch.ones(T, K + 1))
    with pytest.raises(ValueError, match="input_TH: .*shape"):
        copy_rows(torch.ones(T + 1, H), row_map)
    for wrong in (torch.ones(T, K), torch.ones(T, **integers), torch.ones(K, T, **integers).t()):
        with pytest.raises(ValueError, match="row_of_choice: must be dense int64"):
            RowMap(wrong, 210)


LOGITS = torch.zeros(T, 8)


@pytest.mark.parametrize(
    "message, logits, bias, options",
    [
        ("logits_TE: .*2 dimensions", LOGITS[0], None, RouteOptions(2)),
        ("logits_TE: must be float32", LOGITS.long(), None, RouteOptions(2)),
        ("logits_TE: must be float32 or wider, not torch.bfloat16", LOGITS.bfloat16(), None, RouteOptions(2)),
        ("bias_E: .*shape", LOGITS, torch.zeros(7), RouteOptions(2)),
        ("bias_E: .*shape", LOGITS, torch.zeros(1, 8), RouteOptions(2)),
        ("bias_E: .*meta", LOGITS, torch.zeros(8, device="meta"), RouteOptions(2)),
        ("top_k=9: there are only 8 experts", LOGITS, None, RouteOptions(9)),
        ("num_groups=3: must divide", LOGITS, None, RouteOptions(2, num_groups=3)),
    ],
)
def test_route_refuses(message, logits, bias, options, implementation):
    with pytest.raises(ValueError, match=message):
        route(logits, bias, options)


@pytest.mark.parametrize(
    "message, options",
    [
        ("top_k=0", {"top_k": 0}),
        ("score_function", {"top_k": 1, "score_function": "relu"}),
        ("top_k_groups=0", {"top_k": 1, "top_k_groups": 0}),
        ("top_k_groups=3", {"top_k": 1, "num_groups": 2, "top_k_groups": 3}),
    ],
)
def test_options_that_no_router_can_have_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        RouteOptions(**options)


ROWS, BOTH, EXPERTS, WEIGHT = torch.ones(6, 8), torch.ones(3, 2, 5, 8), torch.ones(3, 5, 8), torch.ones(6)
X, COS = torch.ones(2, 6, 3, 8), torch.ones(6, 4)
# Each would read or write outside of an array.
WRONG_PRODUCTS_AND_PASSES = [
    ("weight_OI: .*shape", linear, (ROWS, torch.ones(4, 7))),
    ("weight_OI: .*2 dimensions", linear, (ROWS, EXPERTS)),
    ("input_TI: .*2 dimensions", linear, (X, torch.ones(4, 8))),
    ("weight_OI: .*shape", linears, (ROWS, (torch.ones(4, 8), torch.ones(4, 9)))),
    ("input_RI: .*2 dimensions", grouped_linear, (X, EXPERTS, [2, 2, 2])),
    ("weight_EOI: .*3 dimensions", grouped_linear, (ROWS, EXPERTS[0], [2, 2, 2])),
    ("weight_EOI: .*shape", grouped_linear, (ROWS, EXPERTS[..., :7], [2, 2, 2])),
    ("counts: must be 3 numbers", grouped_linear, (ROWS, EXPERTS, [2, 2, 1, 1])),
    ("counts: .*not to 7", grouped_linear, (ROWS, EXPERTS, [2, 2, 3])),
    ("counts: .*not to 5", grouped_linear, (ROWS, EXPERTS, [2, 2, 1])),
    ("counts: .*not to 7", grouped_linear, (ROWS, EXPERTS, torch.tensor([2, 2, 3]))),
    ("counts: must be 0 at least, not -1", grouped_linear, (ROWS, EXPERTS, [-1, 3, 4])),
    ("counts: must be integers", grouped_linear, (ROWS, EXPERTS, torch.ones(3))),
    ("counts: .*shape", grouped_linear, (ROWS, EXPERTS, torch.ones(4, dtype=torch.int64))),
    ("gate_up_E2FH: must have shape", grouped_swiglu, (ROWS, EXPERTS, WEIGHT, [2, 2, 2])),
    ("gate_up_E2FH: .*shape", grouped_swiglu, (ROWS, BOTH[..., :7], WEIGHT, [2, 2, 2])),
    ("weight_R: .*shape", grouped_swiglu, (ROWS, BOTH, WEIGHT[:5], [2, 2, 2])),
    ("counts: .*input_RH, not to 9", grouped_swiglu, (ROWS, BOTH, WEIGHT, [3, 3, 3])),
    ("up_RF: .*shape", swiglu, (ROWS, ROWS[:5])),
    ("up_RF: .*shape", swiglu, (ROWS, ROWS[:, :4].contiguous())),
    ("weight_R: .*shape", weighted_swiglu, (ROWS, WEIGHT[:5])),
    ("weight_R: .*shape", weighted_swiglu, (ROWS, WEIGHT.unsqueeze(1))),
    ("gate_up_RF: .*even", weighted_swiglu, (ROWS[:, :7].contiguous(), WEIGHT)),
    ("gate_up_RF: .*2 dimensions", weighted_swiglu, (X, WEIGHT)),
    ("weight_H: .*shape", rms_norm, (ROWS, torch.ones(7), 1e-6)),
    ("cos: .*shape", rotate, (X, COS[:5], COS, True)),
    ("sin: .*shape", rotate, (X, COS, COS[:, :3], False)),
    ("x: must have shape", rotate, (X[0], COS, COS, False)),
]


@pytest.mark.parametrize("message, operation, arguments", WRONG_PRODUCTS_AND_PASSES)
def test_products_and_passes_over_rows_refuse_what_does_not_fit(message, operation, arguments, implementation):
    with pytest.raises(ValueError, match=message):
        operation(*arguments)


def test_scan_refuses():
    counts = torch.ones(2, E, dtype=torch.int32)
    for message, arguments in (
        ("tile_counts_NE: must be integers", (counts.float(),)),
        ("tile_counts_NE: .*2 dimensions", (counts[0],)),
        ("tile_score_sums_NE: .*shape", (counts, torch.ones(E))),
    ):
        with pytest.raises(ValueError, match=message):
            scan(*arguments)


def test_a_tensor_without_numbers_never_reaches_the_extension(monkeypatch):
    monkeypatch.setattr(native, "library", object())  # an error if a function of it was called
    experts = torch.empty(T, K, dtype=torch.int64, device="meta")
    assert not native.takes_integers(experts) and native.takes_integers(choices())
    assert rank_choices(experts, E)[0].shape == (T, K)
