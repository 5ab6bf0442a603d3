"""Data, optimizer and the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from r1mega.config.checks import require, require_finite, require_not_negative, require_positive


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
        require_positive("data", self, "sequence_length")


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
        require_finite("optimizer", self)
        require_positive("optimizer", self, "learning_rate", "eps")
        require_not_negative("optimizer", self, "min_learning_rate", "warmup_steps", "decay_steps")
        require_not_negative("optimizer", self, "weight_decay", "clip_grad")
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
        require_positive("train", self, "num_steps", "global_batch_size", "microbatch_size", "keep_checkpoints")
        require_not_negative("train", self, "valid_interval", "valid_batches", "checkpoint_interval", "sample_tokens")
        require(0 <= self.seed < 2**63, "train.seed", self.seed, "must be between 0 and 2**63 - 1")
        require(self.output_dir != "", "train.output_dir", self.output_dir, "must name a folder")
