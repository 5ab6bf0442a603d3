"""Writing Hugging Face's ``config.json``, in DeepSeek's own style (``rope_theta`` and ``rope_scaling``).

transformers, vLLM and llama.cpp all read that style. ``huggingface_config`` reads it back.
"""

from __future__ import annotations

from typing import Any

from r1mega.config import ConfigError, ModelConfig, RopeConfig
from r1mega.model.huggingface_config import ARCHITECTURES


def huggingface_family(config: ModelConfig) -> str:
    """The ``model_type`` that can express ``config``. Raises :class:`ConfigError` where none can."""
    attention, moe = config.attention, config.moe
    if attention.kind == "mla":
        if moe.num_experts:
            _require_exportable(moe.score_function == "sigmoid", "moe.score_function", moe.score_function, "sigmoid")
        return "deepseek_v3"
    scaling = attention.rope.mscale_all_dim if attention.rope.scaling == "yarn" else 0.0
    _require_exportable(not scaling, "attention.rope.mscale_all_dim", scaling, "0 with grouped-query attention")
    _require_exportable(
        not config.num_mtp_layers, "num_mtp_layers", config.num_mtp_layers, "0 without latent attention"
    )
    if moe.num_experts == 0:
        both = attention.qkv_bias and attention.qk_norm
        _require_exportable(not both, "attention.qkv_bias", True, "false together with model.attention.qk_norm")
        return "qwen2" if attention.qkv_bias else "qwen3" if attention.qk_norm else "llama"
    fits: list[tuple[str, Any]] = [
        ("attention.qk_norm", True), ("attention.qkv_bias", False), ("first_dense_layers", 0),
        ("moe.score_function", "softmax"), ("moe.score_bias", False), ("moe.num_shared_experts", 0),
        ("moe.num_groups", 1), ("moe.routed_scaling_factor", 1.0),
    ]  # fmt: skip
    for name, wanted in fits:
        owner: Any = config
        for part in name.split("."):
            owner = getattr(owner, part)
        shown = str(wanted).lower() if isinstance(wanted, bool) else str(wanted)
        _require_exportable(
            owner == wanted, name, owner, f"{shown} for experts with grouped-query attention (Qwen3-MoE)"
        )
    return "qwen3_moe"


def _require_exportable(condition: bool, name: str, value: object, what_fits: str) -> None:
    if not condition:
        raise ConfigError(f"model.{name}={value}: no Hugging Face architecture has it; must be {what_fits}")


def to_huggingface(config: ModelConfig, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """``config.json`` of a model, as :func:`from_huggingface` reads it back.

    Args:
        config: the model.
        dtype: of the stored weights, ``float32`` or ``bfloat16``.
        token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``; None where the tokenizer has none.

    Raises:
        ConfigError: no Hugging Face architecture can express the model.
    """
    family = huggingface_family(config)
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_theta": config.attention.rope.theta,
        "rope_scaling": _rope_scaling(config.attention.rope),
        "torch_dtype": dtype,
        "dtype": dtype,
        **token_ids,
    }
    return values | (_deepseek_fields(config) if family == "deepseek_v3" else _grouped_query_fields(config, family))


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    common = {"factor": rope.factor, "original_max_position_embeddings": rope.original_max_position}
    if rope.scaling == "llama3":
        limits = {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        return {"rope_type": "llama3"} | common | limits
    # Null where null is what makes readers compute the factor of the cosines from factor alone.
    mscales = {"mscale": rope.mscale or None, "mscale_all_dim": rope.mscale_all_dim} if rope.mscale_all_dim else {}
    return {"type": "yarn", "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow} | common | mscales


def _deepseek_fields(config: ModelConfig) -> dict[str, Any]:
    attention, moe = config.attention, config.moe
    return {
        "num_key_value_heads": attention.num_heads,
        "attention_bias": False,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "first_k_dense_replace": config.first_dense_layers if moe.num_experts else config.num_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "n_group": moe.num_groups,
        "topk_group": moe.top_k_groups,
        # Without these two, llama.cpp routes by softmax.
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": moe.normalize_top_k,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "num_nextn_predict_layers": config.num_mtp_layers,
    }


def _grouped_query_fields(config: ModelConfig, family: str) -> dict[str, Any]:
    moe = config.moe
    values: dict[str, Any] = {"num_key_value_heads": config.attention.kv_heads, "head_dim": config.head_dim}
    if family != "qwen2":
        values["attention_bias"] = False
    if family == "llama":
        return values | {"mlp_bias": False}
    values["use_sliding_window"] = False
    if family != "qwen3_moe":
        return values
    return values | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "norm_topk_prob": moe.normalize_top_k,
    }
