"""config.json to settings and back, for released models and for what the model does not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1mega.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, RopeConfig
from r1mega.model.huggingface_config import from_huggingface
from r1mega.model.huggingface_config_writer import to_huggingface
from r1mega.model.huggingface_difference import architecture, first_difference
from r1mega.settings import parse_config

EXAMPLES = Path(__file__).parents[2] / "examples/configs"
R1 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "mlp_bias": False, "attention_bias": False,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 40960,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 1000000.0, "rope_scaling": None,
    "sliding_window": None, "use_sliding_window": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "sliding_window": 32768,
    "use_sliding_window": False, "max_window_layers": 21, "tie_word_embeddings": True, "rope_theta": 1000000.0,
}  # fmt: skip


def test_deepseek_r1_is_the_example_r1_671b():
    example = parse_config(["--config", str(EXAMPLES / "r1_671b.yaml")]).model
    assert first_difference(from_huggingface(R1), example) is None


def test_moonlight_is_the_example_moonlight_16b():
    example = parse_config(["--config", str(EXAMPLES / "moonlight_16b.yaml")]).model
    values = R1 | {
        "vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 27, "first_k_dense_replace": 1,
        "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "q_lora_rank": None,
        "num_attention_heads": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
        "rope_scaling": None, "num_nextn_predict_layers": 0, "max_position_embeddings": 8192,
        "quantization_config": None,
    }  # fmt: skip
    assert first_difference(from_huggingface(values), example) is None


def test_kimi_k2_is_a_deepseek_v3_of_384_experts_in_one_group():
    values = R1 | {
        "model_type": "kimi_k2", "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
        "num_attention_heads": 64, "num_key_value_heads": 64, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    config = from_huggingface(values)
    assert (config.moe.num_experts, config.moe.num_groups, config.moe.routed_scaling_factor) == (384, 1, 2.827)
    assert to_huggingface(config, "bfloat16", {})["model_type"] == "deepseek_v3"


def test_llama_qwen2_and_qwen3_moe_are_grouped_query_models():
    llama, qwen2, qwen3 = from_huggingface(LLAMA), from_huggingface(QWEN2), from_huggingface(QWEN3_MOE)
    assert llama.attention.rope == RopeConfig(500000.0, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert (llama.attention.kv_heads, llama.head_dim, llama.norm_eps) == (8, 128, 1e-5)
    assert qwen2.attention.qkv_bias and qwen2.tie_embeddings and not qwen2.attention.qk_norm
    assert qwen3.attention.qk_norm and qwen3.head_dim == 128
    assert (qwen3.moe.score_function, qwen3.moe.score_bias, qwen3.moe.normalize_top_k) == ("softmax", False, True)


def test_rope_parameters_and_rope_scaling_with_rope_theta_say_the_same():
    new = {name: value for name, value in R1.items() if name not in ("rope_scaling", "rope_theta")}
    scaling = dict(R1["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    new["rope_parameters"] = scaling | {"rope_theta": 10000}
    assert from_huggingface(new) == from_huggingface(R1)


@pytest.mark.parametrize("values", [R1, LLAMA, QWEN2, QWEN3_MOE], ids=lambda values: values["model_type"])
def test_what_is_written_reads_back_as_the_same_model(values):
    config = from_huggingface(values)
    written = to_huggingface(config, "bfloat16", {"bos_token_id": 0, "eos_token_id": 1})
    assert first_difference(from_huggingface(written), config) is None
    assert written["model_type"] == values["model_type"]
    assert written["rope_theta"] == values["rope_theta"] and "rope_parameters" not in written


REFUSED = [
    (R1, {"attention_bias": True}, "attention_bias=true"),
    (R1, {"scoring_func": "softmax"}, 'scoring_func="softmax"'),
    (R1, {"topk_method": "greedy"}, 'topk_method="greedy"'),
    (R1, {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    (R1, {"rope_interleave": False}, "rope_interleave=false"),
    (R1, {"num_key_value_heads": 8}, "num_key_value_heads=8"),
    (R1, {"quantization_config": {"quant_method": "awq"}}, "quantization_config="),
    (R1, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_type="dynamic"'),
    (R1, {"rope_scaling": R1["rope_scaling"] | {"attention_factor": 2.0}}, "attention_factor=2.0"),
    (R1, {"hidden_size": None}, "hidden_size is missing"),
    (R1, {"hidden_size": "wide"}, 'hidden_size="wide": must be an integer'),
    (R1, {"n_group": 7}, "model.moe.num_groups=7"),
    (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    (QWEN3_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    (QWEN2, {"use_sliding_window": True}, "use_sliding_window=true"),
    (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    (LLAMA, {"sliding_window": 4096}, "sliding_window=4096"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias=true"),
    (LLAMA, {"attention_bias": True}, "attention_bias=true"),
    (LLAMA, {"hidden_act": "gelu"}, 'hidden_act="gelu"'),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (LLAMA, {"model_type": "gpt2"}, 'model_type="gpt2"'),
]


@pytest.mark.parametrize(("values", "changes", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_the_model_does_not_do_is_an_error_that_names_the_field(values, changes, words):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{words}") as error:
        from_huggingface(values | changes)
    assert "\n" not in str(error.value)


NOT_EXPORTABLE = [
    (ModelConfig(moe=MoEConfig(num_experts=4, score_function="softmax")), "model.moe.score_function=softmax"),
    (ModelConfig(attention=AttentionConfig(kind="gqa"), num_mtp_layers=1), "model.num_mtp_layers=1"),
    (ModelConfig(attention=AttentionConfig(kind="gqa", qkv_bias=True, qk_norm=True)), "model.attention.qkv_bias=True"),
    (
        ModelConfig(attention=AttentionConfig(kind="gqa", qk_norm=True), moe=MoEConfig(num_experts=4)),
        "model.moe.score_function=sigmoid",
    ),
    (
        ModelConfig(
            attention=AttentionConfig(kind="gqa", rope=RopeConfig(scaling="yarn", factor=2.0, mscale_all_dim=1.0))
        ),
        "model.attention.rope.mscale_all_dim=1.0",
    ),
]


@pytest.mark.parametrize(("config", "words"), NOT_EXPORTABLE, ids=[words for _, words in NOT_EXPORTABLE])
def test_a_model_that_no_architecture_has_is_refused_by_name(config, words):
    with pytest.raises(ConfigError, match=f"^{words}: no Hugging Face architecture has it; must be"):
        to_huggingface(config, "float32", {})


def test_settings_that_have_no_effect_are_no_difference():
    one = ModelConfig(attention=AttentionConfig(kind="gqa", num_heads=4), moe=MoEConfig(top_k=3))
    attention = AttentionConfig(
        kind="gqa", num_heads=4, num_kv_heads=4, head_dim=32, kv_lora_rank=7, rope=RopeConfig(mscale=3.0)
    )
    other = ModelConfig(attention=attention, moe=MoEConfig(top_k=1), init_std=0.5, max_position=9)
    assert first_difference(one, other) is None
    assert first_difference(one, ModelConfig(hidden_size=256))[0] == "model.hidden_size"
    assert "model.moe.top_k" in architecture(ModelConfig(moe=MoEConfig(num_experts=4)))
