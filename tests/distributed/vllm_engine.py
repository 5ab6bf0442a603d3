"""Generation of a tiny model by a server, under any layout, in a form that layouts can be compared by."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from r1mega.config import Config, DataConfig, ModelConfig, ParallelConfig, RLConfig, TrainConfig
from r1mega.kernels.parameter import local
from r1mega.parallel_state import Layout, ParallelState
from r1mega.rl.rollout.engine import Completion, Request, Sampling
from r1mega.rl.rollout.vllm import VllmEngine
from r1mega.train.learner import Learner, TrainingError
from tests.distributed.grpo_steps import model_of_rl

STAND_IN = Path(__file__).with_name("stand_in")
VOCABULARY = 61  # ids; the model has 64 rows
LOG = "vllm/server.log"


def nothing(learner: Learner) -> None:
    """Weights stay as they are."""


@dataclass
class Job:
    """What to generate, with ``other`` in the end; ``fault`` is the stand-in's. ``syncs`` change the weights before."""

    folder: Path
    tokenizer: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=model_of_rl)
    rl: RLConfig = field(default_factory=RLConfig)
    fault: str = ""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=6, seed=7, stop=(3, 4, 9)))
    other: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, max_tokens=2))
    syncs: tuple[Callable[[Learner], None], ...] = (nothing,)


@dataclass
class Result:
    """Of one rank, one entry a sync: completions, and the difference that the check has found; or one error."""

    completions: list[list[Completion]] = field(default_factory=list)
    order: list[list[tuple[int, int]]] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)  # of the server; each start begins a new one, with its port
    other: list[Completion] = field(default_factory=list)
    error: str = ""


@torch.no_grad()
def move(learner: Learner) -> None:
    """Other weights, the same on any layout."""
    for _, parameter in learner.parameters:
        local(parameter).mul_(0.8)


def requests(num_prompts: int = 4) -> list[Request]:
    """Prompts of 2 to 5 tokens, two samples each."""
    return [Request([(7 * key + i) % VOCABULARY for i in range(2 + key)], 100 + key, 2) for key in range(num_prompts)]


def generate(rank: int, world_size: int, job: Job) -> Result:
    """What ``job`` asks for, on this rank."""
    config = Config(
        model=job.model,
        parallel=job.parallel,
        data=DataConfig(sequence_length=16, tokenizer=job.tokenizer),
        train=TrainConfig(global_batch_size=8, microbatch_size=2, dtype="float32", output_dir=str(job.folder)),
        rl=dataclasses.replace(job.rl, engine="vllm", max_prompt_tokens=8, max_new_tokens=8),
    )
    state = ParallelState(Layout.from_config(job.parallel, world_size))
    learner = Learner(config, state)
    learner.begin(None)
    mine = requests()[state.rank_in("dp") :: state.size("dp")]
    result = Result()
    with _environment(PYTHONPATH=f"{STAND_IN}{os.pathsep}{STAND_IN.parents[2]}", STAND_IN=job.fault, RANK="0"):
        engine = VllmEngine(config, state, learner, VOCABULARY)
        try:
            for change in job.syncs:
                change(learner)
                engine.sync_weights()
                order: list[tuple[int, int]] = []
                result.completions.append(
                    engine.generate(mine, job.sampling, lambda c, order=order: order.append((c.key, c.sample)))
                )
                result.order.append(order)
                result.differences.append(engine.difference)
                result.logs.append((job.folder / LOG).read_text())
            result.other = engine.generate(mine, job.other)
        except TrainingError as error:
            result.error = str(error)
        finally:
            engine.close()
    return result


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
