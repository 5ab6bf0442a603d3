"""Every setting of r1mega, as dataclasses grouped by concern.

This package imports neither torch nor any other part of r1mega. Each class validates what it can see; what needs
several classes, or the number of processes, is checked by :meth:`Config.validate`. Every error is a
:class:`ConfigError` of one line that names the field, the value and what would fit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from r1mega.config.checks import ConfigError, divisors, require
from r1mega.config.model import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from r1mega.config.parallel import SCHEDULE_NAMES, ParallelConfig
from r1mega.config.rl import RewardConfig, RLConfig, VllmConfig
from r1mega.config.training import DataConfig, OptimizerConfig, TrainConfig

__all__ = [
    "SCHEDULE_NAMES",
    "AttentionConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "MoEConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RLConfig",
    "RewardConfig",
    "RopeConfig",
    "TrainConfig",
    "VllmConfig",
    "divisors",
    "require",
    "validate_model_layout",
]


@dataclass
class Config:
    """A whole job.

    Args:
        model: the model.
        parallel: the layout.
        data: the data.
        optimizer: the optimizer.
        train: the run.
        rl: reinforcement learning; nothing else looks at it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rl: RLConfig = field(default_factory=RLConfig)

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
