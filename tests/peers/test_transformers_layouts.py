"""What transformers says, r1mega says under every kind of parallelism too, each rank reading its own shards only."""

from __future__ import annotations

import pytest

from r1mega.config import ParallelConfig
from tests.peers.checkpoint_runner import answer_on_rank
from tests.peers.transformers_oracle import (
    COMMON, DEEPSEEK, LLAMA3, QWEN_MOE, answer_of_transformers, assert_same, make_model, make_mtp, make_tokens,
    mtp_answer_of_transformers, save_with_mtp,
)  # fmt: skip

LAYOUTS = {
    "tp2": (2, ParallelConfig(tp=2)),
    "pp2": (2, ParallelConfig(pp=2)),
    "ep2": (2, ParallelConfig(ep=2)),
    "tp2_pp2_ep2": (4, ParallelConfig(tp=2, pp=2, ep=2)),
}
GROUPED_QUERY = {
    "Llama": {"num_key_value_heads": 2, "rope_scaling": LLAMA3},
    "Qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "Qwen3Moe": {"num_key_value_heads": 2, "head_dim": 24, **QWEN_MOE},
}
MTP_COEFFICIENT = 0.3  # r1mega's default


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepseek_with_mtp_agrees_in_logits_losses_and_every_gradient(pool, layout, tmp_path):
    model = make_model("DeepseekV3", **DEEPSEEK)
    mtp = make_mtp(model, 1)
    save_with_mtp(model, mtp, tmp_path)
    tokens, labels = make_tokens(DEEPSEEK["vocab_size"])
    world_size, parallel = LAYOUTS[layout]
    ours = pool.run(answer_on_rank, world_size, tmp_path, parallel, tokens, labels)[0]
    assert_same(ours, mtp_answer_of_transformers(model, mtp, tokens, labels, MTP_COEFFICIENT))


CASES = [(kind, layout) for kind in GROUPED_QUERY for layout in ("tp2", "pp2")] + [("Qwen3Moe", "ep2")]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_grouped_query_models_agree_in_logits_loss_and_every_gradient(pool, kind, layout, tmp_path):
    model = make_model(kind, **COMMON | GROUPED_QUERY[kind])
    model.save_pretrained(tmp_path)
    tokens, labels = make_tokens(COMMON["vocab_size"])
    world_size, parallel = LAYOUTS[layout]
    ours = pool.run(answer_on_rank, world_size, tmp_path, parallel, tokens, labels)[0]
    assert_same(ours, answer_of_transformers(model, tokens, labels))
