"""r1mega's model says what transformers' DeepseekV3ForCausalLM says, from the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.peers.transformers_oracle import (
    DEEPSEEK,
    YARN,
    answer_of_stage,
    answer_of_transformers,
    assert_same,
    difference,
    load,
    make_model,
    make_tokens,
)

VARIANTS = {
    "q_lora": {},
    "no_q_lora": {"q_lora_rank": None},
    "equal_mscales": {"rope_scaling": YARN | {"mscale": 1.0}},
    "no_mscales": {"rope_scaling": {name: YARN[name] for name in YARN if not name.startswith("mscale")}},
    "no_scaling": {"rope_scaling": None, "rope_theta": 500.0},
    "tied": {"tie_word_embeddings": True},
    "unnormalised_weights": {"norm_topk_prob": False},
    "one_group_two_shared": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "routed_scaling_factor": 2.827},
    "large_epsilon": {"rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_agree(variant, tmp_path):
    model = make_model("DeepseekV3", **DEEPSEEK | VARIANTS[variant])
    model.save_pretrained(tmp_path)
    stage, config = load(tmp_path)
    tokens, labels = make_tokens(config.vocab_size)
    assert_same(answer_of_stage(stage, tokens, labels), answer_of_transformers(model, tokens, labels))


@torch.no_grad()
def without_bias(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()


SWITCHED_OFF: dict[str, tuple[dict, Callable[[nn.Module], None]]] = {
    "group limits": ({"n_group": 1, "topk_group": 1}, lambda model: None),
    "router bias": ({}, without_bias),
    "YaRN": ({"rope_scaling": None}, lambda model: None),
}


@pytest.mark.parametrize("what", SWITCHED_OFF)
def test_group_limits_bias_and_yarn_decide_the_logits_that_are_compared(what):
    """Otherwise agreement to 1e-5 would say nothing about them."""
    settings, change = SWITCHED_OFF[what]
    model, other = make_model("DeepseekV3", **DEEPSEEK), make_model("DeepseekV3", **DEEPSEEK | settings)
    weights = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in weights)
    change(other)
    tokens, labels = make_tokens(DEEPSEEK["vocab_size"])
    changed = difference(
        answer_of_transformers(other, tokens, labels).logits, answer_of_transformers(model, tokens, labels).logits
    )
    assert changed > 1e-2
