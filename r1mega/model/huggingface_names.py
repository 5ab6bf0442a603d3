"""Weight names and shapes, r1mega's to Hugging Face's and back: pure data, no torch.

r1mega's names are Hugging Face's without ``model.``, with two differences: the experts of a layer are two tensors
here, ``gate_up_proj [experts, 2, rows, columns]`` and ``down_proj [experts, rows, columns]``, and a matrix each there;
and MTP layer ``i`` is layer ``num_layers + i`` there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from r1mega.config import ModelConfig

Shape = tuple[int, ...]

# MTP layers of released checkpoints repeat the model's embedding and head.
_EMBEDDING_COPY, _HEAD_COPY = "embed_tokens.weight", "shared_head.head.weight"
_MTP_NAMES = {"norm.weight": "shared_head.norm.weight"}
_MTP_OWN = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_GATE_UP = ("gate_proj", "up_proj")
VALUE_HEAD = "value_head.weight"  # of PPO; no checkpoint of Hugging Face's has one
_HF_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Place:
    """Where a tensor of a Hugging Face checkpoint belongs.

    Args:
        name: r1mega's name of the parameter or buffer.
        index: of one expert's matrix in it, (expert,) or (expert, 0 for gate and 1 for up); () is the whole tensor.
    """

    name: str
    index: tuple[int, ...] = ()


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Global shape of every parameter, and of every router's score bias, by r1mega's name."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_layers):
        shapes |= _layer_shapes(config, layer, f"layers.{layer}")
    shapes["norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(config.num_mtp_layers):
        shapes |= {f"mtp.{i}.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "norm")}
        shapes[f"mtp.{i}.eh_proj.weight"] = (hidden, 2 * hidden)
        shapes |= _layer_shapes(config, config.num_layers + i, f"mtp.{i}.layer")
    return shapes


def _layer_shapes(config: ModelConfig, layer: int, prefix: str) -> dict[str, Shape]:
    hidden, moe = config.hidden_size, config.moe
    shapes: dict[str, Shape] = {
        f"{prefix}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")
    }
    attention = _mla_shapes(config) if config.attention.kind == "mla" else _gqa_shapes(config)
    shapes |= {f"{prefix}.self_attn.{name}": shape for name, shape in attention.items()}
    if not config.is_moe_layer(layer):
        return shapes | _feed_forward_shapes(f"{prefix}.mlp", hidden, config.ffn_hidden_size)
    shapes[f"{prefix}.mlp.gate.weight"] = (moe.num_experts, hidden)
    if moe.score_bias:
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (moe.num_experts,)
    shapes[f"{prefix}.mlp.experts.gate_up_proj"] = (moe.num_experts, 2, moe.ffn_hidden_size, hidden)
    shapes[f"{prefix}.mlp.experts.down_proj"] = (moe.num_experts, hidden, moe.ffn_hidden_size)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.ffn_hidden_size
        shapes |= _feed_forward_shapes(f"{prefix}.mlp.shared_experts", hidden, width)
    return shapes


def _feed_forward_shapes(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    rows: dict[str, Shape] = {f"{prefix}.{name}.weight": (width, hidden) for name in ("gate_proj", "up_proj")}
    return rows | {f"{prefix}.down_proj.weight": (hidden, width)}


def _mla_shapes(config: ModelConfig) -> dict[str, Shape]:
    a, hidden = config.attention, config.hidden_size
    q_width = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    query: dict[str, Shape] = {"q_proj.weight": (q_width, hidden)}
    if a.q_lora_rank is not None:
        query = {
            "q_a_proj.weight": (a.q_lora_rank, hidden),
            "q_a_layernorm.weight": (a.q_lora_rank,),
            "q_b_proj.weight": (q_width, a.q_lora_rank),
        }
    return query | {
        "kv_a_proj_with_mqa.weight": (a.kv_lora_rank + a.qk_rope_head_dim, hidden),
        "kv_a_layernorm.weight": (a.kv_lora_rank,),
        "kv_b_proj.weight": (a.num_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank),
        "o_proj.weight": (hidden, a.num_heads * a.v_head_dim),
    }


def _gqa_shapes(config: ModelConfig) -> dict[str, Shape]:
    a, hidden, head_dim = config.attention, config.hidden_size, config.head_dim
    widths = {"q_proj": a.num_heads * head_dim, "k_proj": a.kv_heads * head_dim, "v_proj": a.kv_heads * head_dim}
    shapes: dict[str, Shape] = {f"{name}.weight": (width, hidden) for name, width in widths.items()}
    if a.qkv_bias:
        shapes |= {f"{name}.bias": (width,) for name, width in widths.items()}
    if a.qk_norm:
        shapes |= {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
    return shapes | {"o_proj.weight": (hidden, a.num_heads * head_dim)}


def to_huggingface_name(name: str, config: ModelConfig, index: tuple[int, ...] = ()) -> str:
    """Hugging Face's name of the tensor ``name``, or of the matrix ``index`` in it (see :class:`Place`)."""
    if found := _EXPERT.fullmatch(name):
        assert index, f"{name} holds a matrix for each expert; say which"
        projection = found[2] if len(index) == 1 else _GATE_UP[index[1]]
        name = f"{found[1]}.{index[0]}.{projection}.weight"
    if name == "lm_head.weight":
        return name
    if not name.startswith("mtp."):
        return f"model.{name}"
    _, mtp, rest = name.split(".", 2)
    layer = config.num_layers + int(mtp)
    rest = rest.removeprefix("layer.") if rest.startswith("layer.") else _MTP_NAMES.get(rest, rest)
    return f"model.layers.{layer}.{rest}"


def from_huggingface_name(hf_name: str, config: ModelConfig) -> Place:
    """Where the tensor ``hf_name`` belongs. The inverse of :func:`to_huggingface_name`; it need not exist."""
    name = hf_name.removeprefix("model.")
    index: tuple[int, ...] = ()
    if found := _HF_EXPERT.fullmatch(name):
        expert, projection = int(found[2]), found[3]
        fused = projection in _GATE_UP
        index = (expert, _GATE_UP.index(projection)) if fused else (expert,)
        name = f"{found[1]}.{'gate_up_proj' if fused else projection}"
    layer = re.match(r"layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) >= config.num_layers:
        mtp, rest = int(layer[1]) - config.num_layers, name[layer.end() :]
        own = {theirs: ours for ours, theirs in _MTP_NAMES.items()} | {same: same for same in _MTP_OWN}
        name = f"mtp.{mtp}.{own[rest]}" if rest in own else f"mtp.{mtp}.layer.{rest}"
    return Place(name, index)


def huggingface_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor that a Hugging Face checkpoint of the model must have."""
    shapes: dict[str, Shape] = {}
    for name, shape in parameter_shapes(config).items():
        for index in matrices(shape):
            shapes[to_huggingface_name(name, config, index)] = shape[-2:]
    return shapes


def matrices(shape: Shape) -> Iterator[tuple[int, ...]]:
    """The index of every matrix in a tensor of ``shape``; a vector or a matrix has one, ()."""
    return itertools.product(*map(range, shape[:-2]))


def copied_tensors(config: ModelConfig) -> dict[str, str]:
    """Tensors that a checkpoint may hold as a copy, with Hugging Face's name of the tensor that they repeat."""
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    copies = {"lm_head.weight": head} if config.tie_embeddings else {}
    for layer in range(config.num_layers, config.num_layers + config.num_mtp_layers):
        copies[f"model.layers.{layer}.{_EMBEDDING_COPY}"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.{_HEAD_COPY}"] = head
    return copies


def is_derived(hf_name: str) -> bool:
    """Whether a tensor holds nothing but what follows from the configuration (old Llama checkpoints)."""
    return hf_name.endswith(".rotary_emb.inv_freq")
