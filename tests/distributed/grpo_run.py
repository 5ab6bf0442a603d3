"""Whole GRPO runs of a tiny R1-shaped model under any layout, in a form that layouts can be compared by."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from r1mega.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RLConfig, TrainConfig
from r1mega.config.rl import RewardConfig
from r1mega.moe.balance import named_routers
from r1mega.rl import grpo as program
from r1mega.rl import rewards
from r1mega.rl.completions import read_completions
from r1mega.rl.evaluator import read_evaluations
from r1mega.rl.options import LossOptions
from r1mega.rl.rewards.definition import resolve
from r1mega.rl.rollout.engine import Completion
from r1mega.rl.rollout.native import NativeEngine
from r1mega.rl.tasks.addition import AdditionTask, write_addition
from r1mega.train.checkpoint_files import _read_whole, newest_checkpoint, read_metadata
from r1mega.train.learner import Learner
from r1mega.train.metrics import CLOCK_FIELDS, read_metrics
from tests.distributed.grpo_steps import model_of_rl

CLOCKS = {*CLOCK_FIELDS, "rollout_seconds"}
REWARDS = "tests.distributed.grpo_rewards"
NAMES = [f"{REWARDS}:digits", f"{REWARDS}:has_one"]


def write_data(folder: Path) -> Path:
    """A tokenizer, prompts of 4 to 8 tokens, and three prompts to evaluate on."""
    data = write_addition(folder / "data", AdditionTask(num_prompts=4, num_evaluation=1, num_demonstrations=1)).folder
    texts = ["1+2=", "34+5=", "678+901=", "7+86=", "99+1=", "5+5=", "123+4=", "20+30=", "6+7="]
    lines = [json.dumps({"prompt": text, "reference": "1"}) + "\n" for text in texts]
    (data / "six.jsonl").write_text("".join(lines[:6]))
    (data / "three.jsonl").write_text("".join(lines[6:]))
    (data / "short.jsonl").write_text(
        "".join(json.dumps({"prompt": digit, "reference": "1"}) + "\n" for digit in "123")
    )
    (data / "one.jsonl").write_text(json.dumps({"prompt": "4", "reference": "1"}) + "\n")
    return data


def make_config(data: Path, model: ModelConfig | None = None, **rl: Any) -> Config:
    """3 rollouts of 4 prompts x 4 completions, with 2 optimizer steps each."""
    settings: dict[str, Any] = dict(
        prompts=str(data / "six.jsonl"),
        eval_prompts=str(data / "three.jsonl"),
        group_size=4,
        minibatches=2,
        max_prompt_tokens=8,
        max_new_tokens=6,
        temperature=0.8,
        reference_interval=4,
        bias_update_rate=0.01,
        eval_interval=4,
        eval_samples=3,
        show_interval=0,
        loss=LossOptions(kl_coefficient=0.05),
        reward=RewardConfig(names=list(NAMES), weights=[1.0, 0.5], correct=NAMES[1]),
    )
    return Config(
        model=model or model_of_rl(),
        data=DataConfig(tokenizer=str(data)),
        optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant", warmup_steps=0, clip_grad=0.5),
        train=TrainConfig(
            num_steps=6, global_batch_size=8, microbatch_size=1, dtype="float64", checkpoint_interval=0,
        ),
        rl=RLConfig(**(settings | rl)),
    )  # fmt: skip


def in_folder(config: Config, folder: Path, resume: bool = False, parallel: dict[str, Any] | None = None) -> Config:
    train = dataclasses.replace(config.train, output_dir=str(folder), resume=resume)
    return dataclasses.replace(config, train=train, parallel=ParallelConfig(**(parallel or {})))


class InlinePool:
    """Rewards computed where they are asked for: processes would take most of a test's time."""

    def __init__(self, options: rewards.RewardOptions, num_workers: int = 1) -> None:
        self._options = options
        self._functions = {name: resolve(name).function for name in options.names}

    def submit(self, sample: rewards.Sample) -> Future[rewards.Scores]:
        values, failures = {}, {}
        for name, function in self._functions.items():
            try:
                values[name] = float(function(sample))
            except Exception as error:
                values[name], failures[name] = 0.0, f"raised: {error}"
        total = sum(self._options.weight(name) * value for name, value in values.items())
        future: Future[rewards.Scores] = Future()
        future.set_result(rewards.Scores(total, values, failures))
        return future

    def close(self) -> None:
        pass


@dataclass
class Seen:
    """What :func:`run` has watched on this rank, by optimizer step."""

    status: int = 0
    loads: list[dict[str, list[int]]] = field(default_factory=list)
    router_gradients: list[dict[str, float]] = field(default_factory=list)
    recorded: list[dict[str, list[int]]] = field(default_factory=list)  # by call of the engine


def run(
    rank: int,
    world_size: int,
    config: Config,
    perturbation: float = 0.0,
    real: bool = False,
    spoil: Callable[[Completion], None] | None = None,
) -> Seen:
    """The program of one rank.

    Args:
        perturbation: added to the routers' score bias of every other expert while completions are generated.
        real: compute rewards in processes, and draw pictures.
        spoil: may change a completion that the engine reports.
    """
    seen = Seen()
    with contextlib.ExitStack() as stack:
        ranks = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        stack.enter_context(mock.patch.dict(os.environ, ranks))
        if not real:
            stack.enter_context(mock.patch.object(rewards, "RewardPool", InlinePool))
            stack.enter_context(mock.patch.object(program, "check_rewards", lambda options: None))
            stack.enter_context(mock.patch("r1mega.rl.pictures.plot_run", lambda *arguments, **options: []))
        if perturbation:
            _perturb_rollouts(stack, perturbation)
        _watch(stack, seen, spoil)
        seen.status = program.grpo(config)
    return seen


def _perturb_rollouts(stack: contextlib.ExitStack, perturbation: float) -> None:
    generate = NativeEngine.generate

    def perturbed(self: NativeEngine, *arguments: Any) -> Any:
        with _shifted(self, perturbation):
            return generate(self, *arguments)

    stack.enter_context(mock.patch.object(NativeEngine, "generate", perturbed))


@contextlib.contextmanager
def _shifted(engine: NativeEngine, by: float) -> Iterator[None]:
    biases = [router.e_score_correction_bias for _, router in named_routers(engine.stages.values())]
    before = [bias.clone() for bias in biases]
    for bias in biases:
        bias[::2] += by
    yield
    for bias, value in zip(biases, before, strict=True):
        bias.copy_(value)


def _watch(stack: contextlib.ExitStack, seen: Seen, spoil: Callable[[Completion], None] | None) -> None:
    update, bias, generate = Learner.update, Learner.update_router_bias, NativeEngine.generate

    def watched_generate(self: NativeEngine, *arguments: Any) -> list[Completion]:
        completions = generate(self, *arguments)
        counts: dict[str, Tensor] = {}
        for completion in completions:
            for layer, experts in (completion.experts or {}).items():
                count = torch.bincount(experts.flatten().to(torch.int64), minlength=self.config.moe.num_experts)
                name = f"layers.{layer}.mlp.gate"
                counts[name] = counts[name] + count if name in counts else count
            if spoil is not None:
                spoil(completion)
        seen.recorded.append({name: count.tolist() for name, count in counts.items()})
        return completions

    def watched_update(self: Learner, *arguments: Any) -> Any:
        norm, found = self.gradients.norm, {}

        def keep() -> float:
            for name, parameter in self.parameters:
                if name.endswith("mlp.gate.weight") and parameter.grad is not None:
                    gradient = getattr(parameter.grad, "to_local", lambda g=parameter.grad: g)()
                    found[name] = max(found.get(name, 0.0), float(gradient.abs().max())) if gradient.numel() else 0.0
            return norm()

        with mock.patch.object(self.gradients, "norm", keep):
            result = update(self, *arguments)
        seen.router_gradients.append(found)
        return result

    def watched_bias(self: Learner) -> dict[str, Tensor]:
        loads = bias(self)
        seen.loads.append({name: load.tolist() for name, load in loads.items()})
        return loads

    stack.enter_context(mock.patch.object(NativeEngine, "generate", watched_generate))
    stack.enter_context(mock.patch.object(Learner, "update", watched_update))
    stack.enter_context(mock.patch.object(Learner, "update_router_bias", watched_bias))


@dataclass
class Result:
    """What a run has left in its folder."""

    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def result(folder: Path) -> Result:
    lines = read_metrics(folder / "metrics.jsonl")
    metrics = [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    metadata = read_metadata(checkpoint)
    tensors = {
        name: _read_whole(checkpoint, name, stored, metadata)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    return Result(metrics, read_evaluations(folder), list(read_completions(folder)), tensors)
