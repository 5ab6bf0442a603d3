"""r1mega's model says what transformers' DeepseekV3ForCausalLM says, from the same checkpoint."""

from __future__ import annotations

import pytest

from tests.peers.transformers_oracle import (
    DEEPSEEK,
    YARN,
    answer_of_stage,
    answer_of_transformers,
    assert_same,
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
