"""The same decoder with grouped-query attention says what transformers' Llama, Qwen2, Qwen3 and Qwen3-MoE say."""

from __future__ import annotations

import pytest

from tests.peers.transformers_oracle import (
    COMMON,
    LLAMA3,
    QWEN_MOE,
    answer_of_stage,
    answer_of_transformers,
    assert_same,
    load,
    make_model,
    make_tokens,
)

YARN_BY_FACTOR = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "llama": ("Llama", {"num_key_value_heads": 2, "rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama_many_heads": ("Llama", {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_theta": 1000000.0}),
    "qwen2_yarn": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_scaling": YARN_BY_FACTOR}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 24}),
    "qwen3_moe": ("Qwen3Moe", {"num_key_value_heads": 2, "head_dim": 24, **QWEN_MOE}),
    "qwen3_moe_unnormalised": (
        "Qwen3Moe", {"num_key_value_heads": 2, "head_dim": 24, **QWEN_MOE, "norm_topk_prob": False}
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_agree(variant, tmp_path):
    kind, settings = VARIANTS[variant]
    model = make_model(kind, **COMMON | settings)
    model.save_pretrained(tmp_path)
    stage, config = load(tmp_path)
    tokens, labels = make_tokens(config.vocab_size)
    assert_same(answer_of_stage(stage, tokens, labels), answer_of_transformers(model, tokens, labels))
