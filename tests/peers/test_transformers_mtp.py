"""Multi-token prediction says what transformers' MTP layers (around its DeepseekV3DecoderLayer) say."""

from __future__ import annotations

import pytest

from tests.peers.transformers_oracle import (
    DEEPSEEK,
    answer_of_stage,
    assert_same,
    load,
    make_model,
    make_mtp,
    make_tokens,
    mtp_answer_of_transformers,
    save_with_mtp,
)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_mtp_logits_losses_and_every_gradient_agree(num_layers, settings, tmp_path):
    model = make_model("DeepseekV3", **DEEPSEEK | settings)
    mtp = make_mtp(model, num_layers)
    save_with_mtp(model, mtp, tmp_path)
    stage, config = load(tmp_path)
    assert config.num_mtp_layers == num_layers
    tokens, labels = make_tokens(config.vocab_size)
    theirs = mtp_answer_of_transformers(model, mtp, tokens, labels, config.mtp_loss_coefficient)
    assert len(theirs.predictions) == num_layers + 1
    assert_same(answer_of_stage(stage, tokens, labels), theirs)
