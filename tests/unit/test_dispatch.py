"""What a message holds, where tokens go, and what is kept for the backward; no process group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1mega.config import MoEConfig
from r1mega.kernels import native
from r1mega.kernels.route import RouteOptions, route
from r1mega.moe.collectives import Splits
from r1mega.moe.exchanges import ExpertRanks, Plan, once_per_rank
from r1mega.moe.layer import MoELayer
from r1mega.moe.wire import RowFormat, decode, encode
from r1mega.parallel_state import ParallelState

TYPES = [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]


@pytest.mark.parametrize("num_rows, width", [(0, 4), (1, 7), (5, 200)])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("wire", ["model", "bfloat16", "float8"])
def test_weights_and_experts_travel_bit_for_bit_behind_their_row(num_rows, width, types, wire):
    dtype, weight_dtype = (getattr(torch, name) for name in types)
    rows, weights = torch.randn(num_rows, width).to(dtype), torch.randn(num_rows, 3).to(weight_dtype)
    if num_rows:
        weights[0, 0], weights[0, 1] = torch.nan, torch.inf
    experts = torch.randint(0, 300, (num_rows, 3))
    format = RowFormat(width, 3, dtype, weight_dtype, wire)
    message = format.pack(rows, weights, experts)
    got_rows, got_weights, got_experts = format.unpack(message)
    assert got_weights.view(torch.uint8).equal(weights.view(torch.uint8)) and got_experts.equal(experts.int() + 1)
    assert message.shape[1] * message.element_size() % 16 == 0
    if wire == "model":
        assert got_rows.equal(rows)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("wire", ["model", "bfloat16", "float8"])
def test_gradients_of_weights_travel_bit_for_bit(types, wire):
    dtype, weight_dtype = (getattr(torch, name) for name in types)
    rows, weights = torch.randn(2, 5, 7).to(dtype), torch.randn(2, 5, 3).to(weight_dtype)
    format = RowFormat(7, 3, dtype, weight_dtype, wire)
    packed = torch.stack([format.pack_gradients(r, w, format.wire_back) for r, w in zip(rows, weights, strict=True)])
    got_rows, got_weights = format.unpack_gradients(packed, format.wire_back)
    assert got_weights.equal(weights)
    torch.testing.assert_close(got_rows, rows, rtol=0.0 if wire == "model" else 2**-8, atol=0.0)


def test_float8_keeps_each_block_to_four_bits_of_its_largest_value():
    rows = torch.randn(20, 300) * torch.logspace(-6, 6, 20).unsqueeze(1)
    rows[:, 128:256] *= 1e-4
    got = decode(encode(rows, "float8"), 300, torch.float32, "float8")
    for block in (slice(0, 128), slice(128, 256), slice(256, 300)):
        largest = rows[:, block].abs().amax(1)
        error = (got[:, block] - rows[:, block]).abs()
        assert (error.amax(1) <= largest / 448 * 16).all()  # half a step of the highest binade
        torch.testing.assert_close(got[:, block].abs().amax(1), largest)


def test_float8_shows_a_broken_model_and_sends_zeros_as_zeros():
    rows = torch.zeros(3, 130)
    rows[1, 5], rows[2, 129] = torch.nan, torch.inf
    got = decode(encode(rows, "float8"), 130, torch.float32, "float8")
    assert got[0].eq(0).all() and got[1, 5].isnan() and not got[2, 129].isfinite() and got[2, :128].eq(0).all()


def test_a_token_goes_once_to_each_rank_of_its_experts():
    experts = torch.rand(200, 12, generator=torch.Generator().manual_seed(0)).topk(5).indices
    experts[::3, 2] = 12
    for num_ranks in (1, 2, 3, 6, 12):
        size = 12 // num_ranks
        found = once_per_rank(experts, size, num_ranks)
        for choices, ranks in zip(experts.tolist(), found.tolist(), strict=True):
            wanted = [expert // size for expert in choices]
            first = [r if r < num_ranks and r not in wanted[:k] else num_ranks for k, r in enumerate(wanted)]
            assert ranks == first


NODES = [(4, 2, 16, 4), (8, 3, 8, 2), (8, 2, 4, 1)]


@pytest.mark.parametrize("num_groups, top_k_groups, num_ranks, ranks_of_node", NODES)
def test_group_limited_routing_limits_the_nodes_of_a_token(num_groups, top_k_groups, num_ranks, ranks_of_node):
    """Where the experts of a group are on one node."""
    logits = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))

    def most_nodes(options: RouteOptions) -> int:
        ranks = once_per_rank(route(logits, None, options).experts_TK, 64 // num_ranks, num_ranks)
        return max(len({rank // ranks_of_node for rank in ranks if rank < num_ranks}) for ranks in ranks.tolist())

    assert most_nodes(RouteOptions(6, num_groups=num_groups, top_k_groups=top_k_groups)) == top_k_groups
    assert most_nodes(RouteOptions(6)) > top_k_groups


class Group:
    """A process group as far as a plan looks at it: two ranks, of which this is the second."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


class Moves(TorchDispatchMode):
    """Remembers by name what has written ``least`` bytes or more: PyTorch's operations and the C++ kernels."""

    def __init__(self, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.least, self.names = least, []
        call = native.call
        monkeypatch.setattr(native, "call", lambda name, *args: (self.names.append(name), call(name, *args)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            made = isinstance(tensor, Tensor) and not func.is_view and not func.__name__.startswith("empty")
            if made and tensor.nbytes >= self.least:
                self.names.append(func.__name__)
        return result


@pytest.mark.parametrize("by_extension", [pytest.param(True, marks=pytest.mark.needs_extension), False])
@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize("wire", ["model", "bfloat16", "float8"])
def test_a_received_row_is_moved_once_into_rows_of_the_experts_without_gaps(wire, capacity, by_extension, monkeypatch):
    if not by_extension:
        monkeypatch.setattr(native, "library", None)
    torch.manual_seed(0)
    tokens, hidden, top_k, num_experts = 50, 128, 4, 6
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    experts = torch.rand(tokens, num_experts).topk(top_k).indices
    format = RowFormat(hidden, top_k, x.dtype, weights.dtype, wire)
    here = [(int(e), t) for t, of_token in enumerate(experts) for e in of_token if e >= 3]
    counts = [sum(e == expert for e, _ in here) for expert in (3, 4, 5)]
    plan = Plan(ExpertRanks(num_experts, Group(), None), format, experts, capacity, keep_source=True)
    padded = [2 * capacity] * 3 if capacity else counts
    plan.splits = Splits([0, tokens], [0, tokens], [tokens], padded)
    message, order = format.pack(x, weights, experts), torch.tensor([t for _, t in sorted(here)])
    least = x.nbytes if wire == "model" else sum(counts) * hidden * 4  # other wires are decoded: no more than N rows
    with Moves(least, monkeypatch) as moves:
        rows, row_weights = plan.arrive(message)
        again = plan.rows_again()
    moved = {"permute", "copy_rows"} if by_extension else {"index_select.default"}
    assert len([name for name in moves.names if name in moved]) == 2, moves.names  # one for each call above
    assert set(moves.names) - moved <= ({"zero_.default", "index_fill_.int_Scalar"} if capacity else set()), moves.names
    assert rows.shape == again.shape == (sum(padded), hidden) and row_weights.shape == (sum(padded),)
    assert rows.is_contiguous() and again.is_contiguous() and rows.equal(again)
    owned = torch.cat([torch.arange(n) + i * padded[i] if capacity else torch.arange(n) + sum(counts[:i])
                       for i, n in enumerate(counts)])  # fmt: skip
    assert rows[owned].equal(format.unpack(message)[0][order])


class Storages(TorchDispatchMode):
    """Remembers every storage that an operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        return result

    @property
    def live_bytes(self) -> int:
        return sum(num_bytes for reference, num_bytes in self.made.values() if not reference.expired())


def one_step(recompute: bool, tokens: int, hidden: int, width: int) -> tuple[int, list[Tensor]]:
    """Bytes that a forward leaves behind; its output and all gradients."""
    config = MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=width, num_shared_experts=1, recompute=recompute)
    torch.manual_seed(0)
    layer = MoELayer(hidden, config, ParallelState.single_process())
    with Storages() as storages:
        x = torch.randn(tokens, hidden, requires_grad=True)
        output = layer(x, tokens, 1)[0]
    left = storages.live_bytes
    output.square().sum().backward()
    return left, [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def test_recomputing_keeps_neither_the_experts_rows_nor_the_result_of_swiglu_and_changes_no_bit():
    """Of R rows: R (H + F) numbers less; what stays is gate and up, 2 R F, and the weights."""
    tokens, hidden, width = 64, 24, 40
    plain, plain_results = one_step(False, tokens, hidden, width)
    less, results = one_step(True, tokens, hidden, width)
    assert plain - less == 4 * 2 * tokens * (hidden + width)
    assert all(a.equal(b) for a, b in zip(plain_results, results, strict=True))
