"""Reading Hugging Face's ``config.json`` as :class:`ModelConfig`. Neither torch nor transformers is imported.

Known are DeepSeek-V3 and -R1 (Moonlight, Kimi-K2), Qwen2, Qwen3, Qwen3-MoE and Llama. What a config asks for and the
model does not do is an error that names the field. ``huggingface_config_writer`` is the way back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1mega.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, RopeConfig

CONFIG_FILE = "config.json"
ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Kimi-K2 calls itself kimi_k2 and is built of DeepSeek-V3's classes.
ALIASES = {"kimi_k2": "deepseek_v3"}

# Fields whose other values ask for something that the model does not have. A missing or null field is as good.
FIXED: dict[str, dict[str, Any]] = {
    "all": {
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
    },
    "deepseek_v3": {
        "attention_bias": False,
        "rope_interleave": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "qwen2": {},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "llama": {"attention_bias": False},
}


def read_config(path: str | Path) -> dict[str, Any]:
    """``config.json`` of the checkpoint folder ``path``. Raises :class:`ConfigError`."""
    file = Path(path) / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"model.checkpoint={path}: {CONFIG_FILE}: {error.strerror}; must be a folder with a Hugging Face checkpoint"
        ) from error
    except ValueError as error:
        raise ConfigError(f"model.checkpoint={path}: {CONFIG_FILE} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"model.checkpoint={path}: {CONFIG_FILE} must hold one JSON object")
    return values


def from_huggingface(values: dict[str, Any], source: str = CONFIG_FILE) -> ModelConfig:
    """The model that a ``config.json`` describes.

    Args:
        values: the parsed file.
        source: what errors call the file.

    Raises:
        ConfigError: a field is missing, cannot be understood, or asks for what the model does not do.
    """
    fields = _Fields(values, source)
    model_type = fields.take("model_type")
    family = ALIASES.get(model_type, model_type)
    if family not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *ALIASES])
        raise fields.error("model_type", model_type, f"is not a model that r1mega knows ({known})")
    for name, wanted in (FIXED["all"] | FIXED[family]).items():
        fields.require(name, wanted)
    if any(kind != "full_attention" for kind in fields.take("layer_types", None) or ()):
        raise fields.error("layer_types", fields.take("layer_types"), "must be full_attention for every layer")
    if fields.take("sliding_window", None) is not None and fields.take("use_sliding_window", None) is None:
        raise fields.error("sliding_window", fields.take("sliding_window"), "the model has no sliding window")
    _check_quantization(fields)
    try:
        return _deepseek(fields) if family == "deepseek_v3" else _grouped_query(fields, family)
    except ConfigError as error:
        if str(error).startswith(source):
            raise
        raise ConfigError(f"{source}: {error}") from error


class _Fields:
    """The fields of a ``config.json``, taken with errors that name them."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def error(self, name: str, value: object, what_fits: str) -> ConfigError:
        return ConfigError(f"{self.source}: {name}={json.dumps(value)}: {what_fits}")

    def take(self, name: str, *default: Any) -> Any:
        """The value of a field; a missing or null one is ``default``, or an error without a default."""
        value = self.values.get(name)
        if value is not None:
            return value
        if not default:
            raise ConfigError(f"{self.source}: {name} is missing")
        return default[0]

    def number(self, name: str, *default: Any, kind: type = int) -> Any:
        """The same for an integer, or a number with ``kind=float``."""
        value = self.take(name, *default)
        fits = isinstance(value, int | float) if kind is float else isinstance(value, int)
        if value is None or (fits and not isinstance(value, bool)):
            return value if value is None else kind(value)
        raise self.error(name, value, f"must be {'a number' if kind is float else 'an integer'}")

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "must be true or false")
        return value

    def require(self, name: str, wanted: Any) -> None:
        value = self.take(name, wanted)
        if value != wanted:
            raise self.error(name, value, f"the model has {json.dumps(wanted)} only")


def _check_quantization(fields: _Fields) -> None:
    """Plain weights, or the FP8 blocks of DeepSeek's releases."""
    quantization = fields.take("quantization_config", None)
    if quantization is None:
        return
    kind = quantization.get("quant_method"), quantization.get("fmt", "e4m3"), quantization.get("weight_block_size")
    if kind != ("fp8", "e4m3", [128, 128]):
        raise fields.error("quantization_config", quantization, "must be fp8 (e4m3) in blocks of [128, 128], or absent")


def _deepseek(fields: _Fields) -> ModelConfig:
    heads = fields.number("num_attention_heads")
    kv_heads = fields.number("num_key_value_heads", heads)
    if kv_heads != heads:
        raise fields.error(
            "num_key_value_heads", kv_heads, f"must be num_attention_heads ({heads}) with latent attention"
        )
    experts = fields.number("n_routed_experts", 0)
    moe = MoEConfig()
    if experts:
        moe = MoEConfig(
            num_experts=experts,
            top_k=fields.number("num_experts_per_tok"),
            ffn_hidden_size=fields.number("moe_intermediate_size"),
            num_shared_experts=fields.number("n_shared_experts", 0),
            num_groups=fields.number("n_group", 1),
            top_k_groups=fields.number("topk_group", 1),
            score_function="sigmoid",
            normalize_top_k=fields.flag("norm_topk_prob", True),
            routed_scaling_factor=fields.number("routed_scaling_factor", kind=float),
            score_bias=True,
        )
    attention = AttentionConfig(
        kind="mla",
        num_heads=heads,
        q_lora_rank=fields.number("q_lora_rank", None),
        kv_lora_rank=fields.number("kv_lora_rank"),
        qk_nope_head_dim=fields.number("qk_nope_head_dim"),
        qk_rope_head_dim=fields.number("qk_rope_head_dim"),
        v_head_dim=fields.number("v_head_dim"),
        rope=_rope(fields),
    )
    mtp_layers = fields.number("num_nextn_predict_layers", fields.number("num_mtp_layers", 0))
    dense_layers = min(fields.number("first_k_dense_replace"), fields.number("num_hidden_layers"))
    return _model(fields, attention, moe, num_mtp_layers=mtp_layers, first_dense_layers=dense_layers if experts else 0)


def _grouped_query(fields: _Fields, family: str) -> ModelConfig:
    heads = fields.number("num_attention_heads")
    default = [heads] if family == "llama" else []
    attention = AttentionConfig(
        kind="gqa",
        num_heads=heads,
        num_kv_heads=fields.number("num_key_value_heads", *default),
        head_dim=fields.number("head_dim", 128 if family == "qwen3" else None),
        qkv_bias=family == "qwen2",
        qk_norm=family in ("qwen3", "qwen3_moe"),
        rope=_rope(fields),
    )
    if attention.rope.scaling == "yarn" and attention.rope.mscale_all_dim:
        raise fields.error("mscale_all_dim", attention.rope.mscale_all_dim, "is for latent attention (DeepSeek) only")
    moe = MoEConfig()
    if family == "qwen3_moe":
        moe = MoEConfig(
            num_experts=fields.number("num_experts", fields.number("num_local_experts", None)) or 0,
            top_k=fields.number("num_experts_per_tok"),
            ffn_hidden_size=fields.number("moe_intermediate_size"),
            score_function="softmax",
            normalize_top_k=fields.flag("norm_topk_prob", False),
            score_bias=False,
        )
    return _model(fields, attention, moe)


def _model(fields: _Fields, attention: AttentionConfig, moe: MoEConfig, **more: Any) -> ModelConfig:
    """What all families share."""
    return ModelConfig(
        vocab_size=fields.number("vocab_size"),
        hidden_size=fields.number("hidden_size"),
        num_layers=fields.number("num_hidden_layers"),
        ffn_hidden_size=fields.number("intermediate_size"),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        norm_eps=fields.number("rms_norm_eps", 1e-6, kind=float),
        init_std=fields.number("initializer_range", 0.02, kind=float),
        max_position=fields.number("max_position_embeddings"),
        attention=attention,
        moe=moe,
        **more,
    )


def _rope(fields: _Fields) -> RopeConfig:
    """Both styles: ``rope_parameters``, and ``rope_scaling`` beside ``rope_theta``."""
    values = fields.take("rope_parameters", None) or fields.take("rope_scaling", None) or {}
    if not isinstance(values, dict):
        raise fields.error("rope_scaling", values, "must be an object")
    rope = _Fields(values, fields.source)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0, kind=float), kind=float)
    kind = rope.take("rope_type", rope.take("type", "default"))
    rope.require("partial_rotary_factor", 1.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind not in ("yarn", "llama3"):
        raise rope.error("rope_type", kind, "must be default, yarn or llama3")
    longest = fields.number("max_position_embeddings")
    original = rope.number("original_max_position_embeddings", longest)
    factor = rope.number("factor", longest / original, kind=float)
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=factor,
            original_max_position=original,
            low_freq_factor=rope.number("low_freq_factor", kind=float),
            high_freq_factor=rope.number("high_freq_factor", kind=float),
        )
    rope.require("truncate", True)
    if rope.take("attention_factor", None) is not None:
        raise rope.error("attention_factor", rope.take("attention_factor"), "must be left out: it follows from factor")
    all_dim = rope.number("mscale_all_dim", 0.0, kind=float)
    return RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0, kind=float),
        beta_slow=rope.number("beta_slow", 1.0, kind=float),
        # Alone, mscale has no effect in transformers; mscale_all_dim alone does not lower the factor of the cosines.
        mscale=rope.number("mscale", 0.0, kind=float) if all_dim else 1.0,
        mscale_all_dim=all_dim,
    )
