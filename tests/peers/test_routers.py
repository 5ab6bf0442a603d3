"""The router's choices and weights against transformers' and megatron-core's, on 10,000 random tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from r1mega.data.megatron import quiet_import
from r1mega.kernels import native
from r1mega.kernels.route import Choices, RouteOptions, reference_route, route

with quiet_import():
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

TOKENS, HIDDEN = 10_000, 32
# experts, choices, groups, kept groups; DeepSeek-V3's first. Choices are twice the kept groups, so that megatron-core's
# value of a group is a sum of two as well (test_router_ties.py). Ties are tested there, too.
SIZES = [(256, 8, 8, 4), (64, 6, 1, 1), (32, 4, 4, 2)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def dense(experts: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(experts.shape[0], num_experts).scatter_(1, experts, weights)


def decide(implementation: str, logits: Tensor, bias: Tensor | None, options: RouteOptions) -> Choices:
    if implementation == "C++" and native.library is None:
        pytest.skip(native.reason)
    return (route if implementation == "C++" else reference_route)(logits, bias, options)


@pytest.mark.parametrize("implementation", ["PyTorch", "C++"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_choices_and_weights_equal_transformers_deepseek_v3(size, normalize, implementation):
    num_experts, top_k, num_groups, top_k_groups = size
    config = DeepseekV3Config(
        hidden_size=HIDDEN, n_routed_experts=num_experts, num_experts_per_tok=top_k, n_group=num_groups,
        topk_group=top_k_groups, norm_topk_prob=normalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(random(num_experts, HIDDEN) * 0.2)
        router.e_score_correction_bias.copy_(random(num_experts) * 0.1)
        logits, weights, experts = router(random(TOKENS, HIDDEN))
    options = RouteOptions(top_k, "sigmoid", num_groups, top_k_groups, normalize, 2.5)
    choices = decide(implementation, logits, router.e_score_correction_bias, options)
    assert torch.equal(choices.experts_TK.sort(1).values, experts.sort(1).values)
    expected = dense(experts, weights, num_experts)
    torch.testing.assert_close(
        dense(choices.experts_TK, choices.weights_TK, num_experts), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("implementation", ["PyTorch", "C++"])
@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_choices_weights_and_gradient_equal_megatron_core(size, function, implementation):
    num_experts, top_k, num_groups, top_k_groups = size
    grouped = num_groups > 1
    bias = random(num_experts) * 0.1 if function == "sigmoid" else None
    ours, theirs = (random(TOKENS, num_experts).requires_grad_() for _ in range(2))
    expected, chosen = topk_routing_with_score_function(
        theirs, top_k, use_pre_softmax=True, num_groups=num_groups if grouped else None,
        group_topk=top_k_groups if grouped else None, scaling_factor=2.5, score_function=function, expert_bias=bias,
    )  # fmt: skip
    # Megatron divides by the sum with sigmoid only.
    options = RouteOptions(top_k, function, num_groups, top_k_groups, function == "sigmoid", 2.5)
    choices = decide(implementation, ours, bias, options)
    actual = dense(choices.experts_TK, choices.weights_TK, num_experts)
    assert torch.equal(dense(choices.experts_TK, torch.ones_like(choices.weights_TK), num_experts).bool(), chosen)
    assert torch.equal(choices.counts_E, chosen.sum(0))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    upstream = random(TOKENS, num_experts)
    gradients = [
        torch.autograd.grad(result, leaf, upstream)[0] for result, leaf in ((actual, ours), (expected, theirs))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
