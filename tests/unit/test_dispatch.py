"""What a message holds, where tokens go, and what is kept for the backward; no process group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1mega.config import MoEConfig
from r1mega.kernels.route import RouteOptions, route
from r1mega.moe.exchanges import once_per_rank
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
        assert got_rows[:, :width].equal(rows)


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
