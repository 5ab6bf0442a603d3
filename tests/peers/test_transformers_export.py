"""``r1mega export``: what it writes, transformers loads, with nothing missing or left over and the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.modeling_layers import MtpModel

from r1mega.config import Config, ConfigError, DataConfig, TrainConfig
from r1mega.data.tokenizer import train_tokenizer
from r1mega.model import export as export_module
from r1mega.model.export import export
from r1mega.model.huggingface import model_config_from
from r1mega.train.checkpoint import Checkpointer, Progress
from tests.peers.transformers_oracle import (
    COMMON,
    DEEPSEEK,
    LLAMA3,
    QWEN_MOE,
    difference,
    load,
    make_batch,
    make_model,
    make_mtp,
    make_tokens,
    save_with_mtp,
)

VOCABULARY = 300
KINDS = {
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "deepseek_no_q_lora": ("DeepseekV3", DEEPSEEK | {"q_lora_rank": None, "rope_scaling": None}),
    "deepseek_tied": ("DeepseekV3", DEEPSEEK | {"tie_word_embeddings": True}),
    "llama": ("Llama", COMMON | {"num_key_value_heads": 2, "rope_scaling": LLAMA3}),
    "qwen2_tied": ("Qwen2", COMMON | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", COMMON | {"num_key_value_heads": 2, "head_dim": 24}),
    "qwen3_moe": ("Qwen3Moe", COMMON | {"num_key_value_heads": 2, "head_dim": 24, **QWEN_MOE}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["to be or not to be, that is the question " * 20], VOCABULARY, path)
    return str(path)


def make_run(folder: Path, checkpoint: Path, tokenizer: str, dtype: str = "float32"):
    """A run's folder with one checkpoint, whose weights are those of a Hugging Face checkpoint; returns its stage."""
    stage, model = load(checkpoint)
    config = Config(model=model, data=DataConfig(tokenizer=tokenizer), train=TrainConfig(dtype=dtype))
    saved = stage.state_dict()
    tensors = dict(stage.named_parameters()) | {name: t for name, t in stage.named_buffers() if name in saved}
    checkpointer = Checkpointer(folder / "checkpoints", config)
    checkpointer.save(Progress(3, 30), {f"model.{name}": tensor.detach() for name, tensor in tensors.items()})
    checkpointer.finish()
    return stage


def logits_of(stage, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return stage((), make_batch(tokens, None)).metrics["logits"].view(*tokens.shape, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_an_export_with_no_key_missing_or_left_over_and_the_same_logits(kind, tokenizer, tmp_path):
    name, settings = KINDS[kind]
    make_model(name, **settings | {"vocab_size": VOCABULARY}).save_pretrained(tmp_path / "made")
    stage = make_run(tmp_path / "run", tmp_path / "made", tokenizer)
    assert export(tmp_path / "run", tmp_path / "out") == 0
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert type(model).__name__ == f"{name}ForCausalLM"
    assert model.dtype == torch.float32
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, _ = make_tokens(VOCABULARY)
    with torch.no_grad():
        assert difference(logits_of(stage, tokens), model(input_ids=tokens).logits) < 1e-5
    assert model.generation_config.eos_token_id == 2


def test_an_exported_mtp_layer_is_what_transformers_drafts_with(tokenizer, tmp_path, monkeypatch):
    model = make_model("DeepseekV3", **DEEPSEEK | {"vocab_size": VOCABULARY})
    mtp = make_mtp(model, 1)
    save_with_mtp(model, mtp, tmp_path / "made")
    make_run(tmp_path / "run", tmp_path / "made", tokenizer)
    export(tmp_path / "run", tmp_path / "out")
    made, exported = (load_file(tmp_path / folder / "model.safetensors") for folder in ("made", "out"))
    assert made.keys() == exported.keys()  # the copies of embedding and head too
    assert all(torch.equal(tensor, made[name]) for name, tensor in exported.items())
    # transformers knows the number of R1's MTP layer only.
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\..*"])
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    drafter = MtpModel.from_pretrained(loaded)
    wanted = mtp.layers.state_dict()
    assert wanted.keys() == drafter.layers.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in drafter.layers.state_dict().items())


def test_an_export_in_bfloat16_and_several_files_loads_back_into_r1mega(tokenizer, tmp_path, monkeypatch, capsys):
    model = make_model("DeepseekV3", **DEEPSEEK | {"vocab_size": VOCABULARY})
    save_with_mtp(model, make_mtp(model, 2), tmp_path / "made")
    stage = make_run(tmp_path / "run", tmp_path / "made", tokenizer, dtype="bfloat16")
    monkeypatch.setattr(export_module, "LARGEST_FILE", 100_000)
    export(tmp_path / "run", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert f"{len(files)} files" in capsys.readouterr().out.splitlines()[-1]
    with safe_open(tmp_path / "out" / files[0], framework="pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    again, config = load(tmp_path / "out")
    assert config == model_config_from(tmp_path / "made")
    for (name, ours), (_, theirs) in zip(stage.state_dict().items(), again.state_dict().items(), strict=True):
        ours, theirs = getattr(ours, "_local_tensor", ours), getattr(theirs, "_local_tensor", theirs)
        wanted = ours if name.endswith("bias") else ours.to(torch.bfloat16).to(ours.dtype)
        assert torch.equal(theirs, wanted), name


def test_exported_config_is_in_deepseeks_own_style(tokenizer, tmp_path):
    make_model("DeepseekV3", **DEEPSEEK | {"vocab_size": VOCABULARY}).save_pretrained(tmp_path / "made")
    make_run(tmp_path / "run", tmp_path / "made", tokenizer)
    export(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["scoring_func"] == "sigmoid" and config["topk_method"] == "noaux_tc"
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert config["rope_theta"] == 10000.0 and config["rope_scaling"]["type"] == "yarn"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_an_export_that_fails_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    make_model("Llama", **COMMON).save_pretrained(tmp_path / "made")
    make_run(tmp_path / "run", tmp_path / "made", tokenizer)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full_disk)
        with pytest.raises(ConfigError, match="out: cannot be written: No space left on device"):
            export(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "run"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")
    with pytest.raises(ConfigError, match="out: is not empty"):
        export(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "keep me"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("model: [")])
def test_a_checkpoint_whose_settings_are_gone_is_cut_short(tokenizer, tmp_path, damage):
    make_model("Llama", **COMMON).save_pretrained(tmp_path / "made")
    make_run(tmp_path / "run", tmp_path / "made", tokenizer)
    damage(tmp_path / "run/checkpoints/step_00000003/config.yaml")
    with pytest.raises(ConfigError, match=r"^checkpoint [^\n]*step_00000003 is cut short: config.yaml[^\n]*$"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"RUN=.*: holds no complete checkpoint"):
        export(tmp_path, tmp_path / "out")
