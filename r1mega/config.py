"""Every setting of r1mega, as dataclasses grouped by concern.

This file imports neither torch nor any other part of r1mega. Each class validates what it can see; what
needs several classes, or the number of processes, is checked by :meth:`Config.validate`. Every error is a
:class:`ConfigError` of one line that names the field, the value and what would fit.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line, fit to be shown to a user as it is."""


def require(condition: bool, name: str, value: object, what_fits: str) -> None:
    """Raise ``ConfigError("name=value: what_fits")`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{name}={value}: {what_fits}")


def divisors(number: int) -> str:
    """The divisors of ``number``, 1 or more, as a phrase: ``2, 4, 8 or 16``; 1 is left out where there are others."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    found = found[1:] if len(found) > 1 else found
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def _require_positive(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be positive")


def _require_not_negative(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{prefix}.{name}", value, "must be 0 or more")


def _require_finite(prefix: str, config: object) -> None:
    """Of every number in ``config``: YAML can write infinity and NaN, and 1e999 is infinity, too."""
    for name, value in vars(config).items():
        if isinstance(value, float):
            require(math.isfinite(value), f"{prefix}.{name}", value, "must be finite")


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
        _require_finite("model.attention.rope", self)
        _require_positive("model.attention.rope", self, "theta", "factor", "original_max_position")
        _require_positive("model.attention.rope", self, "beta_slow", "low_freq_factor")
        _require_not_negative("model.attention.rope", self, "mscale", "mscale_all_dim")
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
        _require_positive("model.attention", self, "num_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
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
        recompute: do not keep the experts' rows and the SwiGLU's result; the backward computes them again.
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
        _require_finite("model.moe", self)
        _require_positive("model.moe", self, "top_k", "ffn_hidden_size", "num_groups", "top_k_groups")
        _require_positive("model.moe", self, "routed_scaling_factor", "chunks")
        _require_not_negative("model.moe", self, "num_shared_experts", "bias_update_rate")
        _require_not_negative("model.moe", self, "aux_loss_coefficient", "z_loss_coefficient")
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
    norm_eps: float = 1e-6
    init_std: float = 0.02
    max_position: int = 4096
    checkpoint: str | None = None
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        _require_finite("model", self)
        _require_positive("model", self, "vocab_size", "hidden_size", "num_layers", "ffn_hidden_size", "max_position")
        _require_positive("model", self, "norm_eps", "init_std")
        _require_not_negative("model", self, "num_mtp_layers", "mtp_loss_coefficient")
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


SCHEDULE_NAMES = (
    "gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2", "zbv", "v-half", "v-min", "dualpipe", "dualpipev",
    "auto",
)  # fmt: skip


@dataclass
class ParallelConfig:
    """How the processes share the work. Data parallelism takes what is left of the world.

    Args:
        tp: tensor parallel size (with sequence parallelism, always).
        pp: pipeline parallel size.
        cp: context parallel size; the model refuses more than 1 for now.
        ep: expert parallel size.
        etp: tensor parallel size inside an expert.
        schedule: pipeline schedule: gpipe, 1f1b, interleaved, looped-bfs, zb-h1, zb-h2, zbv, v-half, v-min, dualpipe,
            dualpipev, auto (a search in the memory of 1f1b, for stages as long as their multiply-adds); or a table of
            your own, FILE.csv (`r1mega simulate --help`).
        recompute: keep only the inputs of each stage in the forward, and compute it again right before the backward.
        chunks: stages that a rank holds, for interleaved and looped-bfs (null means 2) and auto (null means 1).
        placement: which block sits on which stage, for people who place layers themselves: ``E`` embedding, ``t``
            decoder layer, ``m`` MTP layer, ``L`` output head and loss, ``|`` between stages, ``t*3`` for ``ttt``;
            for example ``Et*3|t*4|t*4mL``. Null lets r1mega cut by cost.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    schedule: str = "1f1b"
    recompute: bool = False
    chunks: int | None = None
    placement: str | None = None

    def __post_init__(self) -> None:
        known = self.schedule in SCHEDULE_NAMES or self.schedule.endswith(".csv")
        require(
            known,
            "parallel.schedule",
            self.schedule,
            f"must be one of {', '.join(SCHEDULE_NAMES)}, or a table, FILE.csv",
        )
        if self.chunks is not None:
            _require_positive("parallel", self, "chunks")
            free = ("interleaved", "looped-bfs", "auto")
            what_fits = f"{self.schedule} has its own number of stages a rank; for {', '.join(free)} only"
            require(self.schedule in free, "parallel.chunks", self.chunks, what_fits)


@dataclass
class DataConfig:
    """Where tokens come from: Megatron's ``.bin/.idx`` files, as :mod:`tools.prepare_data` writes them.

    Args:
        train: path prefixes (without ``.bin``); each may follow its weight: ``["0.7", "maths", "0.3", "code"]``.
        valid: the same for validation; empty means none.
        tokenizer: a sentencepiece ``.model`` file, or a folder with a Hugging Face ``tokenizer.json``.
        sequence_length: tokens in a sample.
        checksum: sha256 over all files of ``train``, as ``tools/prepare_data.py`` prints it; null skips the check.
        cache_dir: where the sample index is kept; null puts it beside the first data file.
    """

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    sequence_length: int = 256
    checksum: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        _require_positive("data", self, "sequence_length")


@dataclass
class OptimizerConfig:
    """AdamW with a learning-rate schedule.

    Args:
        learning_rate: the highest learning rate.
        min_learning_rate: where the schedule ends (cosine, wsd).
        warmup_steps: steps of linear warm-up from zero.
        schedule: ``cosine``, ``constant`` or ``wsd`` (warm-up, stable, decay).
        decay_steps: wsd: length of the linear decay at the end.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay; vectors (norms, biases) are left out.
        clip_grad: largest global gradient norm; 0 turns clipping off.
    """

    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 20
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    decay_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        _require_finite("optimizer", self)
        _require_positive("optimizer", self, "learning_rate", "eps")
        _require_not_negative("optimizer", self, "min_learning_rate", "warmup_steps", "decay_steps")
        _require_not_negative("optimizer", self, "weight_decay", "clip_grad")
        require(
            self.schedule == "constant" or self.min_learning_rate <= self.learning_rate,
            "optimizer.min_learning_rate",
            self.min_learning_rate,
            f"must be at most optimizer.learning_rate ({self.learning_rate})",
        )
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")


@dataclass
class TrainConfig:
    """The training run.

    Args:
        num_steps: optimizer steps.
        global_batch_size: sequences of one step, over all ranks.
        microbatch_size: sequences that go through the model at once on one data-parallel rank.
        dtype: ``float32``, ``bfloat16`` (with float32 master weights) or ``float64`` (for proofs).
        seed: decides initial weights and the order of the data.
        output_dir: where checkpoints, metrics and pictures go.
        valid_interval: steps between validations; 0 validates at the end only.
        valid_batches: global batches of one validation.
        checkpoint_interval: steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: how many of the newest checkpoints stay.
        resume: go on from the newest complete checkpoint in ``output_dir``; otherwise a folder with a run is refused.
        sample_prompt: text that the model continues at the end of the run; null samples nothing.
        sample_tokens: how many tokens to sample.
    """

    num_steps: int = 100
    global_batch_size: int = 16
    microbatch_size: int = 1
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    seed: int = 1234
    output_dir: str = "runs/pretrain"
    valid_interval: int = 0
    valid_batches: int = 4
    checkpoint_interval: int = 0
    keep_checkpoints: int = 2
    resume: bool = False
    sample_prompt: str | None = None
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        _require_positive("train", self, "num_steps", "global_batch_size", "microbatch_size", "keep_checkpoints")
        _require_not_negative("train", self, "valid_interval", "valid_batches", "checkpoint_interval", "sample_tokens")
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "must be between 0 and 2**63 - 1")
        require(self.output_dir != "", "train.output_dir", self.output_dir, "must name a folder")


@dataclass
class Config:
    """A whole pre-training job.

    Args:
        model: the model.
        parallel: the layout.
        data: the data.
        optimizer: the optimizer.
        train: the run.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def validate(self, world_size: int) -> None:
        """Check everything that can be checked without a file or a process. Raises :class:`ConfigError`."""
        from r1mega.parallel_state import Layout

        layout = Layout.from_config(self.parallel, world_size)
        validate_model_layout(self.model, self.parallel)
        train, tokens = self.train, self.train.microbatch_size * self.data.sequence_length
        require(
            train.global_batch_size % (layout.dp * train.microbatch_size) == 0,
            "train.global_batch_size",
            train.global_batch_size,
            f"must be a multiple of data-parallel size x train.microbatch_size ({layout.dp} x {train.microbatch_size})",
        )
        require(
            tokens % self.parallel.tp == 0,
            "parallel.tp",
            self.parallel.tp,
            f"must divide train.microbatch_size x data.sequence_length ({tokens}), because the sequence is cut as well",
        )
        require(
            self.data.sequence_length <= self.model.max_position,
            "data.sequence_length",
            self.data.sequence_length,
            f"must be at most model.max_position ({self.model.max_position})",
        )

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def validate_model_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that every number that a layout cuts can be cut. Raises :class:`ConfigError`."""
    tp, ep, etp = parallel.tp, parallel.ep, parallel.etp
    require(parallel.cp == 1, "parallel.cp", parallel.cp, "context parallelism is not built into the model; use 1")
    cut_by_tp = {"model.attention.num_heads": model.attention.num_heads, "model.vocab_size": model.vocab_size}
    if model.attention.kind == "gqa":
        cut_by_tp["model.attention.num_kv_heads"] = model.attention.kv_heads
    if model.moe.num_experts == 0 or model.first_dense_layers > 0:
        cut_by_tp["model.ffn_hidden_size"] = model.ffn_hidden_size
    if model.moe.num_experts and model.moe.num_shared_experts:
        cut_by_tp["the shared experts' width"] = model.moe.num_shared_experts * model.moe.ffn_hidden_size
    for name, number in cut_by_tp.items():
        require(number % tp == 0, "parallel.tp", tp, f"must divide {name} ({number}); try {divisors(number)}")
    if model.moe.num_experts == 0:
        require(ep == 1, "parallel.ep", ep, "the model has no experts (model.moe.num_experts=0); use 1")
        require(etp == 1, "parallel.etp", etp, "the model has no experts (model.moe.num_experts=0); use 1")
        return
    experts, width = model.moe.num_experts, model.moe.ffn_hidden_size
    require(
        experts % ep == 0, "parallel.ep", ep, f"must divide the number of experts ({experts}); try {divisors(experts)}"
    )
    require(
        width % etp == 0, "parallel.etp", etp, f"must divide model.moe.ffn_hidden_size ({width}); try {divisors(width)}"
    )
