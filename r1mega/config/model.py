"""The model: attention, experts, decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from r1mega.config.checks import divisors, require, require_finite, require_not_negative, require_positive


@dataclass
class RopeConfig:
    """Rotary position embedding.

    Args:
        theta: base of the frequencies.
        scaling: ``none``, ``yarn`` (DeepSeek, arXiv 2309.00071) or ``llama3``.
        factor: how many times longer the context is than ``original_max_position``.
        original_max_position: context length before the extension, in tokens.
        beta_fast: YaRN: dimensions that turn more often than this over the original context are not scaled.
        beta_slow: YaRN: dimensions that turn less often than this are scaled by the whole factor.
        mscale: YaRN: strength of the attention temperature (DeepSeek's ``mscale``).
        mscale_all_dim: YaRN: the same, applied to the softmax scale (DeepSeek's ``mscale_all_dim``).
        low_freq_factor: llama3: below this many turns, scaled by the whole factor.
        high_freq_factor: llama3: above this many turns, not scaled.
    """

    theta: float = 10000.0
    scaling: Literal["none", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        require_finite("model.attention.rope", self)
        require_positive("model.attention.rope", self, "theta", "factor", "original_max_position")
        require_positive("model.attention.rope", self, "beta_slow", "low_freq_factor")
        require_not_negative("model.attention.rope", self, "mscale", "mscale_all_dim")
        for high, low in (("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor")):
            limit, value = getattr(self, low), getattr(self, high)
            what_fits = f"must be more than model.attention.rope.{low} ({limit})"
            require(value > limit, f"model.attention.rope.{high}", value, what_fits)


@dataclass
class AttentionConfig:
    """Attention: ``mla`` (DeepSeek-V2/V3, multi-head latent attention) or ``gqa`` (Llama, Qwen).

    Args:
        kind: ``mla`` or ``gqa``.
        num_heads: query heads.
        num_kv_heads: gqa: key and value heads; null means as many as ``num_heads``.
        head_dim: gqa: width of a head; null means hidden_size / num_heads.
        qkv_bias: gqa: a bias on the q, k and v projections (Qwen2).
        qk_norm: gqa: RMSNorm on each query and key head (Qwen3).
        q_lora_rank: mla: rank of the query compression; null means a plain query projection.
        kv_lora_rank: mla: rank of the key-value compression.
        qk_nope_head_dim: mla: part of a query/key head without position.
        qk_rope_head_dim: mla: part of a query/key head that is rotated.
        v_head_dim: mla: width of a value head.
        rope: rotary position embedding.
    """

    kind: Literal["mla", "gqa"] = "mla"
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        require_positive("model.attention", self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        require(
            self.qk_rope_head_dim > 0 and self.qk_rope_head_dim % 2 == 0,
            "model.attention.qk_rope_head_dim",
            self.qk_rope_head_dim,
            "must be positive and even",
        )
        for name in ("q_lora_rank", "head_dim"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.attention.{name}", value, "must be positive, or null")
        if self.num_kv_heads is not None:
            require(
                self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
                "model.attention.num_kv_heads",
                self.num_kv_heads,
                f"must divide model.attention.num_heads ({self.num_heads}); try {divisors(self.num_heads)}",
            )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


@dataclass
class MoEConfig:
    """Mixture of experts: the router, the experts and how their load is balanced.

    Args:
        num_experts: routed experts of a layer; 0 makes every layer dense.
        top_k: experts that each token goes to.
        ffn_hidden_size: width of one expert.
        num_shared_experts: experts that every token goes to; they are one feed-forward of this many widths.
        num_groups: groups of neighbouring experts for group-limited routing. With as many groups as nodes share the
            experts (or a multiple), the experts of a group are on one node, as long as the ranks of a node stand side
            by side in the expert-parallel group; then a token crosses to ``top_k_groups`` nodes at most.
        top_k_groups: groups kept for each token (those with the highest sum of two best biased scores).
        score_function: ``sigmoid`` (DeepSeek-V3) or ``softmax`` (Qwen3-MoE).
        normalize_top_k: divide the chosen experts' weights by their sum.
        routed_scaling_factor: the weights are multiplied by this at the end.
        score_bias: a bias on the scores that decides the choice but not the weight (balance without auxiliary loss).
        bias_update_rate: how far the bias of an expert moves each step, towards an equal load (arXiv 2408.15664).
        aux_loss_coefficient: weight of the sequence-wise balance loss (DeepSeek-V3, equations 17-20).
        z_loss_coefficient: weight of the mean squared log-sum-exp of the router logits (ST-MoE).
        capacity_factor: null is dropless. Otherwise each expert takes at most
            ``ceil(capacity_factor * top_k * sequence_length / num_experts)`` tokens of a sequence, those with the
            highest weights; the rest skip it. Per sequence, so that the layout does not change what is dropped.
        pad_to_capacity: pad every expert to its capacity, so that all shapes are known without a look at the router.
        force_balance: ignore the router's choice and deal tokens out evenly; for benchmarks only.
        wire: how rows travel between ranks: ``model`` sends them as they are; ``bfloat16``; ``float8`` (e4m3 with a
            scale for 128 elements) towards the experts and bfloat16 back (DeepSeek-V3, section 3.3).
        chunks: cut the tokens of a layer into this many parts, so that messages of one run under the experts of
            another; schedules that overlap a forward with a backward hide them without it.
        recompute: do not keep the experts' rows and the SwiGLU's result; the backward computes them again. On a GPU the
            SwiGLU is then a kernel of its own and not the end of the first product.
    """

    num_experts: int = 0
    top_k: int = 2
    ffn_hidden_size: int = 64
    num_shared_experts: int = 0
    num_groups: int = 1
    top_k_groups: int = 1
    score_function: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_top_k: bool = True
    routed_scaling_factor: float = 1.0
    score_bias: bool = True
    bias_update_rate: float = 0.001
    aux_loss_coefficient: float = 0.0
    z_loss_coefficient: float = 0.0
    capacity_factor: float | None = None
    pad_to_capacity: bool = False
    force_balance: bool = False
    wire: Literal["model", "bfloat16", "float8"] = "model"
    chunks: int = 1
    recompute: bool = False

    def __post_init__(self) -> None:
        require(self.num_experts >= 0, "model.moe.num_experts", self.num_experts, "must be 0 (dense) or more")
        if self.num_experts == 0:
            return
        require_finite("model.moe", self)
        require_positive("model.moe", self, "top_k", "ffn_hidden_size", "num_groups", "top_k_groups")
        require_positive("model.moe", self, "routed_scaling_factor", "chunks")
        require_not_negative("model.moe", self, "num_shared_experts", "bias_update_rate")
        require_not_negative("model.moe", self, "aux_loss_coefficient", "z_loss_coefficient")
        require(
            self.num_experts % self.num_groups == 0,
            "model.moe.num_groups",
            self.num_groups,
            f"must divide model.moe.num_experts ({self.num_experts}); try {divisors(self.num_experts)}",
        )
        require(
            self.top_k_groups <= self.num_groups,
            "model.moe.top_k_groups",
            self.top_k_groups,
            f"must be at most model.moe.num_groups ({self.num_groups})",
        )
        reachable = self.num_experts // self.num_groups * self.top_k_groups
        require(
            self.top_k <= reachable,
            "model.moe.top_k",
            self.top_k,
            f"must be at most {reachable}, the experts in the kept groups",
        )
        require(
            self.num_groups == 1 or self.num_experts // self.num_groups >= 2,
            "model.moe.num_groups",
            self.num_groups,
            "each group needs two experts at least",
        )
        require(
            self.capacity_factor is None or self.capacity_factor > 0,
            "model.moe.capacity_factor",
            self.capacity_factor,
            "must be positive, or null for dropless routing",
        )
        require(
            not self.pad_to_capacity or self.capacity_factor is not None,
            "model.moe.pad_to_capacity",
            self.pad_to_capacity,
            "needs model.moe.capacity_factor",
        )


@dataclass
class ModelConfig:
    """A decoder: DeepSeek-V3's, or the same with grouped-query attention (Llama, Qwen2, Qwen3, Qwen3-MoE).

    Args:
        vocab_size: rows of the embedding; the tokenizer's size, or more.
        hidden_size: width of the residual stream.
        num_layers: decoder layers, without the MTP layers.
        first_dense_layers: how many layers at the start have a dense feed-forward (with num_experts > 0).
        ffn_hidden_size: width of a dense feed-forward.
        num_mtp_layers: multi-token-prediction layers (DeepSeek-V3, section 2.2).
        mtp_loss_coefficient: weight of the MTP loss.
        tie_embeddings: the output head is the embedding.
        value_head: a head of width 1 beside the output head, for PPO; no part of an export.
        norm_eps: epsilon of RMSNorm.
        init_std: standard deviation of the initial weights.
        max_position: longest context that the exported model claims.
        checkpoint: a Hugging Face checkpoint (folder) to start from; null starts from random weights.
        attention: attention.
        moe: mixture of experts.
    """

    vocab_size: int = 8192
    hidden_size: int = 128
    num_layers: int = 4
    first_dense_layers: int = 0
    ffn_hidden_size: int = 512
    num_mtp_layers: int = 0
    mtp_loss_coefficient: float = 0.3
    tie_embeddings: bool = False
    value_head: bool = False
    norm_eps: float = 1e-6
    init_std: float = 0.02
    max_position: int = 4096
    checkpoint: str | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        require_finite("model", self)
        require_positive("model", self, "vocab_size", "hidden_size", "num_layers", "ffn_hidden_size", "max_position")
        require_positive("model", self, "norm_eps", "init_std")
        require_not_negative("model", self, "num_mtp_layers", "mtp_loss_coefficient")
        require(
            0 <= self.first_dense_layers <= self.num_layers,
            "model.first_dense_layers",
            self.first_dense_layers,
            f"must be between 0 and model.num_layers ({self.num_layers})",
        )
        if self.attention.kind == "gqa":
            if self.attention.head_dim is None:
                require(
                    self.hidden_size % self.attention.num_heads == 0,
                    "model.attention.num_heads",
                    self.attention.num_heads,
                    f"must divide model.hidden_size ({self.hidden_size}) unless model.attention.head_dim is given",
                )
            require(self.head_dim % 2 == 0, "model.attention.head_dim", self.head_dim, "must be even")

    @property
    def head_dim(self) -> int:
        """Width of a gqa head."""
        return self.attention.head_dim or self.hidden_size // self.attention.num_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (an MTP layer counts as ``num_layers + i``) has routed experts."""
        return self.moe.num_experts > 0 and layer >= self.first_dense_layers
