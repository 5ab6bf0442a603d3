"""What transformers says, r1mega says under every kind of parallelism too, each rank reading its own shards only."""

from __future__ import annotations

import re

import pytest
import torch

from r1mega.config import ParallelConfig
from tests.peers.checkpoint_runner import answer_on_rank, reads_on_rank
from tests.peers.transformers_oracle import (
    COMMON,
    DEEPSEEK,
    LLAMA3,
    QWEN_MOE,
    answer_of_transformers,
    assert_same,
    make_model,
    make_mtp,
    make_tokens,
    mtp_answer_of_transformers,
    save_with_mtp,
)

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


def test_a_rank_reads_its_own_shards_and_no_other(pool, tmp_path):
    model = make_model("DeepseekV3", **DEEPSEEK)
    model.save_pretrained(tmp_path)
    parallel = ParallelConfig(tp=2, ep=2, etp=2)
    weights = model.state_dict()
    for read, held, at in pool.run(reads_on_rank, 4, tmp_path, parallel):
        assert sum(read.values()) == sum(tensor.numel() for _, tensor in held.values())
        experts = {int(found[1]) for name in read if (found := re.search(r"\.experts\.(\d+)\.", name))}
        assert experts == set(range(8 * at["ep"], 8 * at["ep"] + 8))
        slices, down = held["layers.1.mlp.experts.down_proj"]
        width = slice(12 * at["etp"], 12 * at["etp"] + 12)
        assert slices == (slice(8 * at["ep"], 8 * at["ep"] + 8), slice(0, 64), width)
        assert torch.equal(down, weights["model.layers.1.mlp.experts.down_proj"][slices])
        slices, head = held["lm_head.weight"]
        assert slices == (slice(64 * at["tp"], 64 * at["tp"] + 64), slice(0, 64))
        assert torch.equal(head, weights["lm_head.weight"][slices])
        assert torch.equal(held["layers.1.mlp.gate.weight"][1], weights["model.layers.1.mlp.gate.weight"])
