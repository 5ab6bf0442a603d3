"""Whether two descriptions of a model mean the same model: what decides weights or logits, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

from r1mega.config import ModelConfig, RopeConfig

# Settings of a training run; a checkpoint neither has them nor depends on them.
TRAINING_SETTINGS = frozenset(
    {"checkpoint", "init_std", "max_position", "mtp_loss_coefficient", "value_head"}
    | {"wire", "chunks", "recompute"}
    | {"bias_update_rate", "aux_loss_coefficient", "z_loss_coefficient"}
    | {"capacity_factor", "pad_to_capacity", "force_balance"}
)


def architecture(config: ModelConfig) -> dict[str, Any]:
    """Every setting that decides weights or logits, by its dotted name (``model.attention.num_heads``).

    What has no effect is left out or made alike: the experts' settings of a dense model, the latent sizes of
    grouped-query attention, a null that stands for a number.
    """
    moe, attention, rope = config.moe, config.attention, config.attention.rope
    flat = _flatten(dataclasses.asdict(config), "model.")
    kept = {name: value for name, value in flat.items() if name.rsplit(".", 1)[-1] not in TRAINING_SETTINGS}
    unused: set[str] = set()
    if moe.num_experts == 0:
        unused |= {name for name in kept if name.startswith("model.moe.")} - {"model.moe.num_experts"}
        unused.add("model.first_dense_layers")
    elif moe.num_groups == 1:
        unused.add("model.moe.top_k_groups")
    latent = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    grouped = ("num_kv_heads", "head_dim", "qkv_bias", "qk_norm")
    unused |= {f"model.attention.{name}" for name in (latent if attention.kind == "gqa" else grouped)}
    if attention.kind == "gqa":
        kept["model.attention.num_kv_heads"] = attention.kv_heads
        kept["model.attention.head_dim"] = config.head_dim
    used_by = {
        "none": {"theta", "scaling"},
        "yarn": {field.name for field in dataclasses.fields(RopeConfig)} - {"low_freq_factor", "high_freq_factor"},
        "llama3": {"theta", "scaling", "factor", "original_max_position", "low_freq_factor", "high_freq_factor"},
    }
    unused |= {
        f"model.attention.rope.{f.name}" for f in dataclasses.fields(RopeConfig) if f.name not in used_by[rope.scaling]
    }
    if not rope.mscale_all_dim:
        unused.add("model.attention.rope.mscale")
    return {name: value for name, value in kept.items() if name not in unused}


def first_difference(here: ModelConfig, there: ModelConfig) -> tuple[str, Any, Any] | None:
    """The first setting of the architecture that differs: its dotted name and both values."""
    ours, theirs = architecture(here), architecture(there)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            return name, ours.get(name), theirs.get(name)
    return None


def _flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
