"""The parameter table, from the model on the meta device."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from r1mega.config import AttentionConfig, ModelConfig, MoEConfig
from r1mega.model.huggingface_names import parameter_shapes
from r1mega.model.summary import COMPONENTS, parameter_counts, parameter_table
from r1mega.settings import parse_config

EXAMPLES = Path(__file__).parents[2] / "examples/configs"


def example(name: str) -> ModelConfig:
    return parse_config(["--config", str(EXAMPLES / f"{name}.yaml")]).model


def test_deepseek_r1_has_the_published_numbers():
    lines = parameter_table(example("r1_671b")).splitlines()
    assert lines[-3:] == [
        "main model            671,026,419,200",
        "active with the head   36,625,618,432",
        "MTP's own              11,610,068,224",
    ]
    cells = {line[:20].strip(): line.split()[-2:] for line in lines[1:-4]}
    assert cells["routed experts"] == [f"{58 * 256 * 44_040_192:,}", f"{58 * 8 * 44_040_192:,}"]
    assert cells["attention"] == [f"{61 * 187_107_328:,}"] * 2
    assert cells["embedding"] == [f"{129280 * 7168:,}", "0"]


def test_a_tied_head_counts_once_and_is_active():
    tied, untied = (parameter_counts(ModelConfig(tie_embeddings=value)) for value in (True, False))
    assert untied["main"].total - tied["main"].total == 8192 * 128
    assert untied["main"].active == tied["main"].active


CONFIGS = {
    "r1_tiny": example("r1_tiny"),
    "no_q_lora_two_mtp": ModelConfig(
        num_mtp_layers=2, moe=MoEConfig(num_experts=4, score_bias=False), tie_embeddings=True
    ),
    "qwen2": ModelConfig(attention=AttentionConfig(kind="gqa", num_kv_heads=2, qkv_bias=True)),
    "qwen3_moe": ModelConfig(
        attention=AttentionConfig(kind="gqa", num_kv_heads=2, head_dim=48, qk_norm=True), moe=MoEConfig(num_experts=4)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_counted_once(name):
    counts = parameter_counts(CONFIGS[name])
    assert sum(counts[component].total for component in COMPONENTS) == counts["main"].total + counts["MTP"].total
    shapes = parameter_shapes(CONFIGS[name])
    assert counts["main"].total == sum(prod(shape) for name, shape in shapes.items() if not name.startswith("mtp."))


def test_no_process_group_is_left_behind():
    import torch.distributed as dist

    before = dist.is_initialized()
    parameter_counts(ModelConfig())
    assert dist.is_initialized() == before


def test_the_model_command_prints_the_table(capsys):
    from r1mega.cli import main

    assert main(["model", "--config", str(EXAMPLES / "r1_671b.yaml")]) == 0
    assert "671,026,419,200" in capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path):
    """A small Qwen3 of transformers."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    return tmp_path / "qwen3"


def test_the_model_command_prints_a_checkpoint_s_model(capsys, checkpoint):
    from r1mega.cli import main

    assert main(["model", "--model.checkpoint", str(checkpoint)]) == 0
    rows = {line[:20].strip(): line.split()[-2:] for line in capsys.readouterr().out.splitlines()}
    assert rows["embedding"] == [f"{160 * 32:,}", "0"]


def test_the_model_command_refuses_a_checkpoint_that_is_not_there(capsys):
    from r1mega.cli import main

    assert main(["model", "--model.checkpoint", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("r1mega: error: model.checkpoint=nowhere")
