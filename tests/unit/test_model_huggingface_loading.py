"""Loading a Hugging Face checkpoint: names, types, FP8, shards; and checkpoints that do not fit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from r1mega.kernels.parameter import local
from r1mega.model.blocks import list_blocks
from r1mega.model.export import huggingface_tensors
from r1mega.model.huggingface import load_huggingface, model_config_from, named_tensors, resolve_model_config
from r1mega.model.huggingface_config_writer import to_huggingface
from r1mega.model.huggingface_files import TensorReader, read_entries
from r1mega.model.huggingface_names import (
    Place,
    copied_tensors,
    from_huggingface_name,
    huggingface_shapes,
    matrices,
    parameter_shapes,
    to_huggingface_name,
)
from r1mega.model.stage import build_stage
from r1mega.parallel_state import ParallelState

MLA = AttentionConfig(
    num_heads=2, q_lora_rank=12, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
)
MOE = MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=136, num_shared_experts=1)
DEEPSEEK = ModelConfig(
    vocab_size=32, hidden_size=144, num_layers=2, first_dense_layers=1, ffn_hidden_size=160, num_mtp_layers=1,
    attention=MLA, moe=MOE,
)  # fmt: skip
QWEN = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, ffn_hidden_size=24, tie_embeddings=True,
    attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, qkv_bias=True),
)  # fmt: skip


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}


def write_checkpoint(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights; returns them by r1mega's names."""
    weights = weights_of(config)
    tensors = {name: tensor.clone() for name, tensor in huggingface_tensors(weights.items(), config, dtype)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_huggingface(config, "float32", {})))
    return weights


def load(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    stage = build_stage(config, ParallelState.single_process(), list_blocks(config, 4), dtype, "cpu")
    load_huggingface(stage, config, folder)
    return {name: local(tensor).detach() for name, tensor in named_tensors(stage).items()}


@pytest.mark.parametrize("config", [DEEPSEEK, QWEN], ids=["deepseek", "qwen2"])
def test_names_and_shapes_are_those_of_the_model_and_map_both_ways(config):
    stage = build_stage(config, ParallelState.single_process(), list_blocks(config, 4), torch.float32, "meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(stage).items()}
    assert shapes == parameter_shapes(config)
    for name, shape in shapes.items():
        for index in matrices(shape):
            hf_name = to_huggingface_name(name, config, index)
            assert from_huggingface_name(hf_name, config) == Place(name, index)
            assert hf_name in huggingface_shapes(config)


def test_an_mtp_layer_is_the_layer_after_the_last():
    assert to_huggingface_name("mtp.0.norm.weight", DEEPSEEK) == "model.layers.2.shared_head.norm.weight"
    assert to_huggingface_name("mtp.0.eh_proj.weight", DEEPSEEK) == "model.layers.2.eh_proj.weight"
    hf_name = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert to_huggingface_name("mtp.0.layer.mlp.experts.gate_up_proj", DEEPSEEK, (3, 1)) == hf_name
    assert copied_tensors(DEEPSEEK)["model.layers.2.shared_head.head.weight"] == "lm_head.weight"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_every_stored_type_loads_into_every_type(stored, wanted, tmp_path):
    weights = write_checkpoint(tmp_path, DEEPSEEK, stored)
    for name, tensor in load(tmp_path, DEEPSEEK, wanted).items():
        is_bias = name.endswith("e_score_correction_bias")
        expected = weights[name] if is_bias else weights[name].to(stored).to(wanted)
        assert tensor.dtype == (torch.float32 if is_bias else wanted)
        assert torch.equal(tensor, expected), name


def test_fp8_blocks_are_multiplied_back_partial_last_blocks_too(tmp_path):
    weights = write_checkpoint(tmp_path, DEEPSEEK)
    tensors, expected = load_file(tmp_path / "model.safetensors"), dict(weights)
    linear = re.compile(r"(self_attn\.\w+_proj\w*|mlp\..*_proj)\.weight")
    for name in [name for name in tensors if linear.search(name)]:
        rows, columns = tensors[name].shape
        scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
        quantised = tensors[name].to(torch.float8_e4m3fn)
        whole = quantised.to(torch.float32) * torch.kron(scale, torch.ones(128, 128))[:rows, :columns]
        place = from_huggingface_name(name, DEEPSEEK)
        if not place.index:
            expected[place.name] = whole
        else:
            expected[place.name][place.index] = whole
        tensors |= {name: quantised, f"{name}_scale_inv": scale}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(values))

    for name, tensor in load(tmp_path, DEEPSEEK).items():
        assert torch.equal(tensor, expected[name]), name
    entries = read_entries(tmp_path)
    with TensorReader(tmp_path, entries) as reader:
        part = reader.read("model.layers.0.mlp.down_proj.weight", (slice(5, 141), slice(127, 130)))
    assert torch.equal(part, expected["layers.0.mlp.down_proj.weight"][5:141, 127:130])

    del tensors["model.layers.0.mlp.down_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="down_proj.weight_scale_inv is missing; must be F32 of shape"):
        model_config_from(tmp_path)


def spoil_missing_file(folder):
    (folder / "model.safetensors").unlink()


def spoil_cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-5])


def spoil_cut_in_header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:40])


def spoil_not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def spoil_config(folder):
    (folder / "config.json").write_text("{")


def edit(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return spoil


SPOILED = {
    "missing_file": (spoil_missing_file, r"model\.safetensors: No such file"),
    "cut_short": (spoil_cut_short, r"model\.safetensors is cut short: it has \d+ bytes of \d+"),
    "cut_in_header": (spoil_cut_in_header, r"model\.safetensors is cut short or not a safetensors file"),
    "not_safetensors": (spoil_not_safetensors, r"model\.safetensors is cut short or not a safetensors file"),
    "broken_config": (spoil_config, r"config\.json is not valid JSON"),
    "missing_expert": (
        edit(lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight")),
        r"model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight is missing$",
    ),
    "left_over": (
        edit(lambda tensors: tensors.update({"model.layers.1.extra.weight": torch.zeros(1)})),
        r"model\.layers\.1\.extra\.weight has no place in the model$",
    ),
    "wrong_shape": (
        edit(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)})),
        r"model\.norm\.weight has shape \(7,\), the model's is \(144,\)",
    ),
    "wrong_type": (
        edit(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(144, dtype=torch.int64)})),
        r"model\.norm\.weight is I64; must be one of",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_checkpoint_that_is_not_whole_is_one_line(name, tmp_path):
    write_checkpoint(tmp_path, DEEPSEEK)
    spoil, words = SPOILED[name]
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=words) as error:
        model_config_from(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_indexed_checkpoint_loads_and_a_missing_part_is_named(tmp_path):
    weights = write_checkpoint(tmp_path, DEEPSEEK)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load(tmp_path, DEEPSEEK).items())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"b\.safetensors: No such file"):
        model_config_from(tmp_path)
    index["weight_map"][names[0]] = "../outside.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"names \.\./outside\.safetensors, which is not in the folder"):
        model_config_from(tmp_path)


def test_mtp_layers_that_are_announced_but_not_stored_are_not_expected(tmp_path):
    write_checkpoint(tmp_path, dataclasses.replace(DEEPSEEK, num_mtp_layers=0))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 1}))
    assert model_config_from(tmp_path).num_mtp_layers == 0


def test_a_run_without_a_model_of_its_own_takes_the_checkpoints_and_keeps_its_training_settings(tmp_path):
    write_checkpoint(tmp_path, DEEPSEEK)
    run = ModelConfig(checkpoint=str(tmp_path), mtp_loss_coefficient=0.1, moe=MoEConfig(aux_loss_coefficient=0.01))
    config = resolve_model_config(run)
    assert (config.hidden_size, config.num_layers, config.attention) == (144, 2, MLA)
    assert (config.checkpoint, config.mtp_loss_coefficient) == (str(tmp_path), 0.1)
    assert config.moe == dataclasses.replace(MOE, aux_loss_coefficient=0.01)


def test_a_run_whose_model_is_another_is_refused_by_the_first_setting_that_differs(tmp_path):
    write_checkpoint(tmp_path, DEEPSEEK)
    same = dataclasses.replace(
        DEEPSEEK, checkpoint=str(tmp_path), moe=dataclasses.replace(MOE, aux_loss_coefficient=1.0)
    )
    assert resolve_model_config(same) == same
    other = dataclasses.replace(same, attention=dataclasses.replace(MLA, kv_lora_rank=24))
    with pytest.raises(ConfigError, match=r"^model\.attention\.kv_lora_rank=24: must be 20, as in the checkpoint"):
        resolve_model_config(other)
    assert resolve_model_config(ModelConfig()) == ModelConfig()


def test_loading_into_another_model_changes_nothing(tmp_path):
    write_checkpoint(tmp_path, DEEPSEEK)
    config = dataclasses.replace(DEEPSEEK, num_layers=3)
    stage = build_stage(config, ParallelState.single_process(), list_blocks(config, 4), torch.float32, "cpu")
    with torch.no_grad():
        local(stage.embed_tokens.weight).fill_(7.0)
    with pytest.raises(ConfigError, match=r"^model\.num_layers=3: must be 2"):
        load_huggingface(stage, config, tmp_path)
    assert (local(stage.embed_tokens.weight) == 7.0).all()
