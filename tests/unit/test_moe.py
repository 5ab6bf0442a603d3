"""Router, capacity, balance loss and bias update, each against its definition."""

from __future__ import annotations

import pytest
import torch

from r1mega.config import MoEConfig
from r1mega.moe.balance import max_over_mean, update_router_bias
from r1mega.moe.layer import MoELayer
from r1mega.moe.router import Router, balance_loss, drop_over_capacity, expert_capacity
from r1mega.parallel_state import ParallelState


@pytest.fixture(scope="module")
def state() -> ParallelState:
    return ParallelState.single_process()


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor = getattr(tensor, "_local_tensor", tensor)
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            else:
                tensor.zero_()
    return module


def scores(num_tokens: int = 50, num_experts: int = 12) -> torch.Tensor:
    return torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_bias_decides_the_choice_but_not_the_weight(state):
    config = MoEConfig(num_experts=6, top_k=2, ffn_hidden_size=8)
    router = filled(Router(4, config, state, torch.float64, "cpu"))
    x = torch.randn(10, 4, dtype=torch.float64)
    router.e_score_correction_bias.copy_(torch.tensor([9.0, 9, 0, 0, 0, 0]))
    routing = router(x, 10, 1)
    assert routing.experts_TK.sort(1).values.tolist() == [[0, 1]] * 10
    chosen = (x @ router.weight.t()).sigmoid().gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, chosen / chosen.sum(1, keepdim=True))


def test_balance_loss_is_the_sum_of_fraction_times_mean_probability_of_each_sequence():
    probabilities = scores(8, 6) / scores(8, 6).sum(1, keepdim=True)
    chosen = probabilities.topk(2).indices
    sequence = torch.arange(8) // 4
    counts = torch.stack([torch.bincount(part.flatten(), minlength=6) for part in chosen.chunk(2)])
    expected = sum((6 / (2 * 4) * counts[b] * probabilities[4 * b : 4 * b + 4].mean(0)).sum() for b in range(2))
    torch.testing.assert_close(balance_loss(probabilities, counts, sequence, length=4, top_k=2), expected)


def test_an_even_router_has_a_balance_loss_of_one():
    probabilities = torch.full((8, 4), 0.25, dtype=torch.float64)
    counts = torch.full((1, 4), 4)
    loss = balance_loss(probabilities, counts, torch.zeros(8, dtype=torch.int64), length=8, top_k=2)
    assert loss.item() == pytest.approx(1.0)


def test_over_capacity_the_lowest_weights_of_each_sequence_are_dropped():
    experts = torch.tensor([[0], [0], [0], [1]] * 2)
    weights = torch.tensor([0.3, 0.9, 0.5, 0.1, 0.2, 0.1, 0.4, 0.6]).unsqueeze(1)
    kept = drop_over_capacity(experts, weights, length=4, num_experts=2, capacity=2)
    assert kept.flatten().tolist() == [2, 0, 0, 1, 0, 2, 0, 1]


def test_capacity_is_the_even_share_times_the_factor_rounded_up():
    assert expert_capacity(MoEConfig(num_experts=8, top_k=2, capacity_factor=1.25), length=10) == 4


def test_a_capacity_nobody_reaches_changes_nothing(state):
    outputs = []
    for changes in ({}, {"capacity_factor": 100.0}, {"capacity_factor": 4.0, "pad_to_capacity": True}):
        config = MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=8, **changes)
        layer = filled(MoELayer(6, config, state, torch.float64, "cpu"))
        x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        outputs.append(layer(x, 8, 2)[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def test_a_layer_used_alone_starts_with_sensible_weights(state):
    layer = MoELayer(64, MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=32, num_shared_experts=1), state)
    for name, parameter in layer.named_parameters():
        assert 0.01 < parameter.detach().std().item() < 0.03, name
    assert layer(torch.randn(10, 64), 10, 1)[0].isfinite().all()
    assert layer.gate.tokens_per_expert.sum() == 20


def test_forced_balance_gives_every_expert_the_same_load(state):
    config = MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=8, force_balance=True)
    router = filled(Router(4, config, state, torch.float32, "cpu"))
    router(torch.randn(32, 4), 32, 1)
    assert router.tokens_per_expert.tolist() == [8] * 8


def test_the_router_computes_in_float32_when_the_model_is_bfloat16(state):
    router = filled(Router(4, MoEConfig(num_experts=4, top_k=2), state, torch.bfloat16, "cpu"))
    assert router(torch.randn(3, 4, dtype=torch.bfloat16), 3, 1).weights_TK.dtype == torch.float32


def test_the_bias_moves_towards_an_even_load_and_the_counts_restart(state):
    router = filled(Router(4, MoEConfig(num_experts=4, top_k=1, bias_update_rate=0.5), state, torch.float32, "cpu"))
    router.e_score_correction_bias.zero_()
    router.tokens_per_expert.copy_(torch.tensor([7, 3, 4, 2]))
    load = update_router_bias([("gate", router)], state)
    assert router.e_score_correction_bias.tolist() == [-0.5, 0.5, 0.0, 0.5]
    assert router.tokens_per_expert.tolist() == [0] * 4
    assert max_over_mean(load["gate"]).item() == pytest.approx(7 / 4)


def test_evaluation_does_not_count_tokens(state):
    router = filled(Router(4, MoEConfig(num_experts=4, top_k=2), state, torch.float32, "cpu"))
    with torch.no_grad():
        router(torch.randn(8, 4), 8, 1)
    assert router.tokens_per_expert.sum() == 0
