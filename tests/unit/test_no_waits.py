"""A layer on one rank never needs a number on the host, so that no GPU is waited for.

On the ``meta`` device there are no numbers: an operation that wants one is an error, as is a tensor made of numbers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1mega.config import MoEConfig
from r1mega.kernels import permute as permute_operation
from r1mega.moe import dispatcher
from r1mega.moe.layer import MoELayer
from r1mega.moe.router import counts_of
from r1mega.parallel_state import ParallelState

OPTIONS = {
    "plain": {},
    "losses": {"aux_loss_coefficient": 0.1, "z_loss_coefficient": 0.1},
    "drops": {"capacity_factor": 1.0},
    "drops, recomputed": {"capacity_factor": 0.5, "recompute": True},
    "padded": {"capacity_factor": 1.0, "pad_to_capacity": True},
    "recomputed": {"recompute": True},
    "shared expert": {"num_shared_experts": 1},
    "forced balance": {"force_balance": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_number_is_wanted_on_the_host(name, monkeypatch):
    layer = MoELayer(16, MoEConfig(8, 2, 8, **OPTIONS[name]), ParallelState.single_process(), device="meta")
    x = torch.empty(12, 16, device="meta", requires_grad=True)
    for function in ("tensor", "as_tensor"):
        original = getattr(torch, function)

        def only_tensors(data, *args, original=original, **options):
            assert isinstance(data, Tensor), "the host waits for a copy of its numbers to a GPU"
            return original(data, *args, **options)

        monkeypatch.setattr(torch, function, only_tensors)
    output, losses = layer(x, 12, 1)
    (output.sum() + sum(losses.values())).backward()
    assert x.grad.shape == output.shape == x.shape


@pytest.mark.parametrize("name", ["drops", "drops, recomputed"])
def test_where_the_number_of_kept_choices_is_unknown_all_have_room_and_the_results_are_the_same(name, monkeypatch):
    torch.manual_seed(0)
    config = MoEConfig(8, 2, 8, **OPTIONS[name])
    layer = MoELayer(16, config, ParallelState.single_process(), torch.float64)
    x, upstream = torch.randn(24, 16, dtype=torch.float64), torch.randn(24, 16, dtype=torch.float64)
    results = []
    for known in (True, False):
        for module in (permute_operation, dispatcher):
            monkeypatch.setattr(module, "on_host", lambda tensor, known=known: known)
        routing = layer.gate(x, 12, 2)
        d = layer.dispatcher.dispatch(x, routing, may_drop=True)
        kept = int(routing.counts_E.sum())
        assert kept < 48 and d.rows.shape[0] == (kept if known else 48)
        assert (d.rows[kept:] == 0).all() and (d.weights[kept:] == 0).all()
        given = x.clone().requires_grad_()
        output = layer(given, 12, 2)[0]
        gradients = torch.autograd.grad(output, (given, *layer.parameters()), upstream)
        results.append([output, *(getattr(gradient, "_local_tensor", gradient) for gradient in gradients)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_counts_are_those_of_bincount():
    values = torch.randint(0, 7, (50, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(counts_of(values, 9), torch.bincount(values.flatten(), minlength=9))
    assert torch.equal(counts_of(values[:0], 2), torch.zeros(2, dtype=torch.int64))
