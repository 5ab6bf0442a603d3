"""Reinforcement learning: prompts, rollouts, rewards, the objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from r1mega.config.checks import require, require_finite, require_not_negative, require_positive
from r1mega.rl.options import AdvantageOptions, LossOptions, PPOOptions


@dataclass
class RewardConfig:
    """What completions are rewarded for.

    Args:
        names: rewards by name (``r1mega.rl.rewards``: accuracy, format, ...), or your own, ``package.module:function``.
        weights: factor of each in the sum; null means 1 for all.
        correct: the reward that says whether an answer is right, for evaluations: 1 is right, all else is wrong.
        workers: processes of each model replica that compute rewards.
        arguments: settings of a reward by its name, as in ``{"language": {"target": "zh"}}``.
        time_limit: seconds that one reward of one completion may take.
        memory_limit: memory that it may allocate, in MiB.
    """

    names: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    weights: list[float] | None = None
    correct: str = "accuracy"
    workers: int = 1
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    time_limit: float = 10.0
    memory_limit: int = 2048

    def __post_init__(self) -> None:
        require_finite("rl.reward", self)
        require_positive("rl.reward", self, "workers", "time_limit", "memory_limit")
        require(bool(self.names), "rl.reward.names", self.names, "must name at least one reward")
        require(len(set(self.names)) == len(self.names), "rl.reward.names", self.names, "names a reward twice")
        if self.weights is not None:
            fits = len(self.weights) == len(self.names)
            require(fits, "rl.reward.weights", self.weights, f"must be as many as rl.reward.names ({len(self.names)})")


@dataclass
class VllmConfig:
    """The vLLM server that generates with ``rl.engine: vllm`` (``r1mega.rl.rollout.vllm``).

    Args:
        python: the Python that has vLLM; null means the one that trains.
        arguments: more flags of vLLM's server, as in ``[--tensor-parallel-size, "8"]``.
        sync: how the server takes over new weights: ``restart`` begins it anew, ``reload`` has it read them while it
            runs, which is faster and which not every vLLM does right (the check below tells).
        tolerance: the greatest difference between a log-probability that vLLM reports and that of the training's
            forward, looked at after each time that weights are taken over; null means 0.001, and 0.2 with bfloat16.
        start_timeout: seconds until the server must be ready.
        request_timeout: seconds within which a completion must come, the time that it waits for others included.
    """

    python: str | None = None
    arguments: list[str] = field(default_factory=list)
    sync: Literal["restart", "reload"] = "restart"
    tolerance: float | None = None
    start_timeout: float = 600.0
    request_timeout: float = 1800.0

    def __post_init__(self) -> None:
        require_finite("rl.vllm", self)
        require_positive("rl.vllm", self, "start_timeout", "request_timeout")
        fits = self.tolerance is None or self.tolerance > 0
        require(fits, "rl.vllm.tolerance", self.tolerance, "must be positive, or null")


@dataclass
class RLConfig:
    """GRPO (arXiv 2402.03300) with rule-based rewards, as DeepSeek-R1 uses it (arXiv 2501.12948).

    A rollout makes ``minibatches`` x ``train.global_batch_size`` completions, ``group_size`` for each of its prompts,
    which are split at random into as many minibatches: one optimizer step each.

    Args:
        algorithm: ``grpo`` compares a completion with its group; ``ppo`` with what a value head expects at each token.
        prompts: JSONL file of ``{"prompt": ..., "reference": ...}``; a run goes round in it.
        eval_prompts: prompts for evaluations; null evaluates nothing.
        template: what a prompt is wrapped in: ``plain`` (nothing), ``r1_zero`` (the paper's table 1), ``r1_chat``.
        group_size: completions of a prompt.
        minibatches: optimizer steps of a rollout.
        max_prompt_tokens: longest prompt.
        max_new_tokens: longest completion, with its end-of-document token.
        temperature: of sampling, and of the objective's log-probabilities.
        top_p: sample from the most probable tokens that have this much probability together.
        max_rows: completions that a model replica generates at the same time; null means all.
        cache: what multi-head latent attention keeps of a token in a rollout: its ``latent``, as DeepSeek-V2 does, or
            ``expanded`` keys and values: many times the memory, but in bfloat16 they are rounded as in training, so
            that log-probabilities agree to 1e-4. In float32 both agree to 1e-5.
        overlong: completions that were cut at ``max_new_tokens``: ``keep`` them as they are, or ``mask`` them: they
            count for their group's mean, but not in the loss (DAPO's overlong filtering).
        dynamic_sampling: how many times groups whose rewards are all equal are generated anew from other prompts
            (DAPO, arXiv 2503.14476); 0 is off.
        pack: put the sequences of a microbatch one behind the other instead of padding them to the longest.
        reference_interval: steps after which the reference policy becomes the present one; 0 keeps the first.
        old_log_probs: the probabilities under which a completion was made, by the ``training`` forward, or as the
            ``rollout`` reports them.
        routing_replay: force the rollout's choices of experts in training (arXiv 2510.11370).
        bias_update_rate: of the router's score bias during RL; 0 freezes it (``model.moe.bias_update_rate`` is for
            pre-training).
        eval_interval: steps between evaluations; 0 evaluates before and after only.
        eval_samples: completions of each evaluation prompt: pass@1 is their mean, cons@k their majority.
        eval_temperature: of these; greedy completions are evaluated besides.
        show_interval: steps between samples that are shown; 0 shows none.
        engine: what generates: ``native`` (the training processes themselves), or ``vllm`` (a server that is started).
        vllm: the server.
        loss: the objective.
        advantage: from rewards to advantages, for ``grpo``.
        ppo: from rewards and values to advantages, for ``ppo``.
        reward: what is rewarded.
    """

    algorithm: Literal["grpo", "ppo"] = "grpo"
    prompts: str | None = None
    eval_prompts: str | None = None
    template: Literal["plain", "r1_zero", "r1_chat"] = "plain"
    group_size: int = 8
    minibatches: int = 1
    max_prompt_tokens: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    max_rows: int | None = None
    cache: Literal["latent", "expanded"] = "latent"
    overlong: Literal["keep", "mask"] = "keep"
    dynamic_sampling: int = 0
    pack: bool = False
    reference_interval: int = 0
    old_log_probs: Literal["training", "rollout"] = "training"
    routing_replay: bool = True
    bias_update_rate: float = 0.0
    eval_interval: int = 0
    eval_samples: int = 16
    eval_temperature: float = 1.0
    show_interval: int = 10
    engine: Literal["native", "vllm"] = "native"
    vllm: VllmConfig = field(default_factory=VllmConfig)
    loss: LossOptions = field(default_factory=LossOptions)
    advantage: AdvantageOptions = field(default_factory=AdvantageOptions)
    ppo: PPOOptions = field(default_factory=PPOOptions)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        require_finite("rl", self)
        require_positive(
            "rl", self, "minibatches", "max_prompt_tokens", "max_new_tokens", "temperature", "eval_samples"
        )
        require_positive("rl", self, "eval_temperature")
        require_not_negative("rl", self, "dynamic_sampling", "reference_interval", "bias_update_rate", "eval_interval")
        require_not_negative("rl", self, "show_interval")
        require(self.group_size >= 2, "rl.group_size", self.group_size, "must be 2 or more: a group compares its own")
        require(0 < self.top_p <= 1, "rl.top_p", self.top_p, "must be over 0 and at most 1")
        require(self.max_rows is None or self.max_rows > 0, "rl.max_rows", self.max_rows, "must be positive, or null")

    @property
    def max_tokens(self) -> int:
        """The longest sequence that is trained on: all of it but its last token."""
        return self.max_prompt_tokens + self.max_new_tokens - 1
