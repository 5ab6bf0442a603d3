"""Tokens over ranks and back: the numbers of a loop over experts in any layout, each token sent once to a rank."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from r1mega.config import MoEConfig, ParallelConfig
from r1mega.kernels import native
from r1mega.moe import collectives
from r1mega.moe.dispatcher import AllToAllDispatcher, routing_of
from r1mega.moe.exchanges import ToExperts, ToTokens
from r1mega.moe.layer import MoELayer
from r1mega.moe.overlap import begin
from r1mega.parallel_state import Layout, ParallelState
from tests.distributed.test_same_numbers import assert_same
from tests.distributed.training import Job, Report, tiny_model, train

EXPERTS, HIDDEN, WIDTH = 8, 6, 4


@dataclass
class Case:
    """``tokens`` has one number for each rank of the world."""

    ep: int
    etp: int
    tokens: tuple[int, ...]
    top_k: int = 3
    drops: bool = False
    capacity: int | None = None
    chunks: int = 1
    wire: str = "model"
    dtype: torch.dtype = torch.float64
    native: bool = True
    ids: torch.dtype = torch.int64


CASES = {
    "ep2": Case(2, 1, (9, 7)),
    "ep2, in PyTorch's operations": Case(2, 1, (9, 7), native=False),
    "ep2, a rank without tokens": Case(2, 1, (9, 0)),
    "ep2, all experts of a token on one rank": Case(2, 1, (9, 7), top_k=8),
    "ep2, dropped choices": Case(2, 1, (9, 7), drops=True),
    "ep2, dropped and padded": Case(2, 1, (9, 9), drops=True, capacity=9),
    "ep2, in three chunks": Case(2, 1, (9, 7), chunks=3),
    "ep2, more chunks than tokens": Case(2, 1, (9, 2), chunks=4),
    "ep2, padded, in two chunks": Case(2, 1, (8, 8), capacity=8, chunks=2),
    "etp2": Case(1, 2, (9, 7)),
    "etp2, padded": Case(1, 2, (7, 7), drops=True, capacity=7),
    "ep4": Case(4, 1, (9, 7, 0, 5), drops=True),
    "ep2 etp2": Case(2, 2, (9, 7, 3, 5)),
    "ep2 etp2, in PyTorch's operations": Case(2, 2, (9, 7, 3, 5), drops=True, native=False),
    "ep2 etp2, padded": Case(2, 2, (5, 5, 5, 5), drops=True, capacity=5),
    "ep2 etp2, in two chunks": Case(2, 2, (9, 7, 3, 5), chunks=2),
    "ep2, experts in int32": Case(2, 1, (9, 7), drops=True, ids=torch.int32),
    "ep2, experts in int16": Case(2, 1, (9, 7), drops=True, ids=torch.int16),
    "ep2, experts in uint8, in two chunks": Case(2, 1, (9, 7), drops=True, ids=torch.uint8, chunks=2),
    "ep2 twice": Case(2, 1, (9, 7, 3, 5)),
    "one rank": Case(1, 1, (9,), drops=True),
}


@dataclass
class Tokens:
    """One rank's tokens, their choices, and the gradient of their outputs."""

    x_TH: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    grad_TH: Tensor


def tokens_of(rank: int, case: Case) -> Tokens:
    generator = torch.Generator().manual_seed(rank)
    count = case.tokens[rank]
    x, grad = (torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = torch.rand(count, EXPERTS, generator=generator, dtype=torch.float64)
    weights, experts = scores.topk(case.top_k)
    if case.drops:
        dropped = torch.rand(experts.shape, generator=generator) < 0.3
        experts = experts.masked_fill(dropped, EXPERTS)
    weight_dtype = torch.promote_types(case.dtype, torch.float32)
    return Tokens(x.to(case.dtype).requires_grad_(), weights.to(weight_dtype).requires_grad_(), experts, grad)


def expert_weights() -> tuple[Tensor, Tensor]:
    """``[E, F, H]`` and ``[E, H, F]``."""
    generator = torch.Generator().manual_seed(99)
    up = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator, dtype=torch.float64)
    return up, torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator, dtype=torch.float64)


def run_experts(rows: Tensor, weights: Tensor, counts: list[int], up: Tensor, down: Tensor) -> Tensor:
    """An expert is ``down(tanh(up x)) * weight``."""
    parts = rows.split(counts)
    outputs = [(part @ u.t()).tanh() @ d.t() for part, u, d in zip(parts, up, down, strict=True)]
    return torch.cat(outputs) * weights.unsqueeze(1).to(rows.dtype)


def expected(rank: int, ranks: list[int], case: Case) -> dict[str, Tensor]:
    """This rank's output and gradients, and the experts' gradients from the tokens of all ``ranks``."""
    up, down = (weight.requires_grad_() for weight in expert_weights())
    mine = None
    for other in ranks:
        t = tokens_of(other, case)
        of_expert = [(t.x_TH.double() @ up[e].t()).tanh() @ down[e].t() for e in range(EXPERTS)]
        padded = torch.stack([*of_expert, torch.zeros_like(t.grad_TH)], dim=1)
        chosen = padded.gather(1, t.experts_TK.unsqueeze(2).expand(-1, -1, HIDDEN))
        out = (chosen * t.weights_TK.unsqueeze(2)).sum(1)
        out.backward(t.grad_TH)
        if other == rank:
            mine = {"out": out.detach(), "grad of x": t.x_TH.grad, "grad of weights": t.weights_TK.grad}
    assert mine is not None
    return mine | {"grad of up": up.grad, "grad of down": down.grad}


def through_dispatcher(
    dispatcher: AllToAllDispatcher, t: Tokens, case: Case, up: Tensor, down: Tensor
) -> dict[str, Tensor]:
    routing = routing_of(t.experts_TK.to(case.ids), t.weights_TK, EXPERTS)
    if case.chunks > 1:
        chunks = dispatcher.prepare_chunks(t.x_TH, routing, case.chunks, case.capacity)
        going = [begin(ToExperts(d.plan), *d.inputs) for d in chunks]
        coming = []
        for d, begun in zip(chunks, going, strict=True):
            rows = run_experts(*begun.wait(), d.counts, up, down)
            coming.append(begin(ToTokens(d.plan), rows))
        out = torch.cat([begun.wait()[0] for begun in coming])
    else:
        d = dispatcher.dispatch(t.x_TH, routing, case.drops, case.capacity)
        out = dispatcher.combine(run_experts(d.rows, d.weights, d.counts, up, down), d)
    out.backward(t.grad_TH.to(out.dtype))
    return {"out": out.detach(), "grad of x": t.x_TH.grad, "grad of weights": t.weights_TK.grad}


def run(rank: int, world_size: int, case: Case) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What the dispatcher gives, twice, beside what is expected."""
    native.library, library = (native.library if case.native else None), native.library
    state = ParallelState(Layout(world_size, ep=case.ep, etp=case.etp))
    first = state.rank_in("ep") * (EXPERTS // case.ep)
    part = state.rank_in("etp") * (WIDTH // case.etp)
    experts, width = slice(first, first + EXPERTS // case.ep), slice(part, part + WIDTH // case.etp)
    results = []
    try:
        for _ in range(2):
            dispatcher = AllToAllDispatcher(EXPERTS, state.group("ep"), state.group("etp"), case.wire)
            up, down = expert_weights()
            up = up[experts, width].to(case.dtype).requires_grad_()
            down = down[experts, :, width].to(case.dtype).requires_grad_()
            found = through_dispatcher(dispatcher, tokens_of(rank, case), case, up, down)
            results.append(found | {"grad of up": up.grad, "grad of down": down.grad})
    finally:
        native.library = library
    (ranks,) = (group for group in state.layout.groups("etp_ep") if rank in group)
    wanted = expected(rank, ranks, case)
    wanted["grad of up"] = wanted["grad of up"][experts, width]
    wanted["grad of down"] = wanted["grad of down"][experts, :, width]
    return [(found, wanted) for found in results]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_all_gradients_equal_a_loop_over_experts(pool, name):
    case = CASES[name]
    for rank, results in enumerate(pool.run(run, len(case.tokens), case)):
        for found, wanted in results:
            for what, tensor in wanted.items():
                assert found[what].shape == tensor.shape
                difference = (found[what] - tensor).abs().max().item() if tensor.numel() else 0.0
                assert difference < 1e-12, f"rank {rank}, {what}"


@pytest.mark.parametrize("name", ["ep2", "ep2, in three chunks", "ep2 etp2", "ep4"])
def test_the_same_run_twice_gives_the_same_bits(pool, name):
    case = replace(CASES[name], dtype=torch.float32)
    for (first, _), (second, _) in pool.run(run, len(case.tokens), case):
        for what, tensor in first.items():
            assert torch.equal(tensor, second[what]), what


WIRES = [("bfloat16", 2e-2), ("float8", 1.5e-1)]


@pytest.mark.parametrize("wire, tolerance", WIRES)
@pytest.mark.parametrize("name", ["ep2", "ep2 etp2", "ep2, dropped and padded"])
def test_a_narrower_wire_costs_precision_and_nothing_else(pool, name, wire, tolerance):
    case = replace(CASES[name], wire=wire, dtype=torch.float32)
    for results in pool.run(run, len(case.tokens), case):
        found, wanted = results[0]
        for what, tensor in wanted.items():
            difference = (found[what].double() - tensor).abs().max() / tensor.abs().max()
            assert 1e-5 < difference < tolerance, what


def test_bfloat16_rows_with_float32_weights(pool):
    case = replace(CASES["ep2 etp2"], dtype=torch.bfloat16)
    for results in pool.run(run, len(case.tokens), case):
        found, wanted = results[0]
        for what, tensor in wanted.items():
            assert (found[what].double() - tensor).abs().max() / tensor.abs().max() < 5e-2, what
        assert found["grad of weights"].dtype == torch.float32


@contextmanager
def counted_messages() -> Iterator[list[int]]:
    """While inside, the bytes of each all-to-all of this rank."""
    sent: list[int] = []
    send = collectives.all_to_all

    def counting(rows, *args):
        sent.append(rows.nbytes)
        return send(rows, *args)

    collectives.all_to_all = counting
    try:
        yield sent
    finally:
        collectives.all_to_all = send


def count_messages(rank: int, world_size: int, case: Case) -> tuple[list[int], int]:
    """The bytes that each message of this rank holds, and D summed over its tokens."""
    state = ParallelState(Layout(world_size, ep=case.ep, etp=case.etp))
    t = tokens_of(rank, case)
    with counted_messages() as sent:
        dispatcher = AllToAllDispatcher(EXPERTS, state.group("ep"), state.group("etp"), case.wire)
        local = slice(rank * EXPERTS // case.ep, (rank + 1) * EXPERTS // case.ep)
        through_dispatcher(dispatcher, t, case, *(weight[local].to(case.dtype) for weight in expert_weights()))
    ranks = t.experts_TK // (EXPERTS // case.ep)
    return sent, sum(len(set(of_token)) for of_token in ranks.tolist())


@pytest.mark.parametrize("wire", ["model", "bfloat16", "float8"])
def test_five_messages_of_one_row_for_each_token_and_rank(pool, wire):
    """Counts; rows with weights and experts behind them; results; their gradients; gradients of rows and weights."""
    case = Case(2, 1, (40, 30), top_k=4, wire=wire, dtype=torch.float32)
    there = {"model": 4 * HIDDEN, "bfloat16": 2 * HIDDEN, "float8": HIDDEN + 4}[wire]
    back = 4 * HIDDEN if wire == "model" else 2 * HIDDEN
    alone = 1 if wire == "model" else 16  # bytes that the size of a row without weights is a multiple of
    weights = 4 * case.top_k
    found = pool.run(count_messages, 2, case)
    for rank, (sent, copies) in enumerate(found):
        assert copies < case.tokens[rank] * case.top_k * 0.6
        rows, gradients_of_results = copies * multiple(there + 2 * weights, 16), copies * multiple(there, alone)
        assert [sent[0], sent[1], sent[3]] == [8 * 2 * (1 + EXPERTS // 2), rows, gradients_of_results]
        assert len(sent) == 5
    copies = sum(copies for _, copies in found)  # what comes back leaves the other ranks
    assert sum(sent[2] for sent, _ in found) == copies * multiple(back, alone)
    assert sum(sent[4] for sent, _ in found) == copies * (back + weights)


def multiple(number: int, of: int) -> int:
    """The next one."""
    return -(-number // of) * of


def layer_choices(rank: int, world_size: int, ep: int, wire: str = "model") -> tuple[Tensor, Tensor]:
    """Choices and outputs of one layer for this rank's tokens; all tokens are the same for every ``ep``."""
    state = ParallelState(Layout(world_size, ep=ep))
    config = MoEConfig(num_experts=EXPERTS, top_k=3, ffn_hidden_size=WIDTH, num_groups=4, top_k_groups=2, wire=wire)
    layer = MoELayer(HIDDEN, config, state, torch.float64)
    first = state.rank_in("ep") * EXPERTS // ep
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        layer.gate.weight.copy_(torch.randn(layer.gate.weight.shape, generator=generator))
        for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj):
            whole = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.to_local().copy_(whole[first : first + EXPERTS // ep])
    x = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return layer.gate(x, 20, 1).experts_TK, layer(x, 20, 1)[0].detach()


def test_under_another_ep_the_choices_are_the_same_and_the_outputs_too(pool):
    one, two, four = (pool.run(layer_choices, 4, ep) for ep in (1, 2, 4))
    for rank in range(4):
        assert torch.equal(one[rank][0], two[rank][0]) and torch.equal(one[rank][0], four[rank][0])
        for other in (two, four):
            torch.testing.assert_close(other[rank][1], one[rank][1], rtol=1e-12, atol=1e-12)


def test_a_layer_sends_on_the_wire_of_its_settings(pool):
    for (_, plain), (_, float8) in zip(
        pool.run(layer_choices, 2, 2), pool.run(layer_choices, 2, 2, "float8"), strict=True
    ):
        assert 1e-4 < (plain - float8).abs().max() / plain.abs().max() < 0.2


OPTIONS = {
    "chunks": (2, ParallelConfig(ep=2), {"chunks": 3}),
    "chunks under etp": (4, ParallelConfig(ep=2, etp=2), {"chunks": 2}),
    "chunks and an overlapping schedule": (4, ParallelConfig(pp=2, ep=2, schedule="dualpipe"), {"chunks": 2}),
    "recomputation": (1, ParallelConfig(), {"recompute": True}),
    "recomputation under ep and etp": (4, ParallelConfig(ep=2, etp=2), {"recompute": True}),
    "both, and split backwards": (4, ParallelConfig(pp=2, ep=2, schedule="zb-h1"), {"recompute": True, "chunks": 2}),
}


@functools.cache
def plain_training(pool) -> Report:
    return pool.run(train, 1, Job(num_steps=2))[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_and_recomputation_change_no_number_of_a_training(pool, name):
    world_size, parallel, changes = OPTIONS[name]
    model = tiny_model()
    model.moe = replace(model.moe, **changes)
    report = pool.run(train, world_size, Job(model, parallel, num_steps=2, microbatch_size=1))[0]
    assert_same(report, plain_training(pool))
