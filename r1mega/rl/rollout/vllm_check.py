"""Whether an engine outside of the training computes with its weights: a few log-probabilities by both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config import Config
from r1mega.pipeline.actions import Kind
from r1mega.rl.microbatches import Form, LogProbHead, Microbatch
from r1mega.rl.rollout.engine import Completion, Request
from r1mega.rl.samples import Sample
from r1mega.train.learner import Learner


class _Sizes(NamedTuple):
    prompts: int
    longest_prompt: int
    tokens: int


CHECK = _Sizes(prompts=4, longest_prompt=12, tokens=8)
_SEED = 20_250_120


def check_requests(num_ids: int, max_prompt_tokens: int) -> list[Request]:
    """Prompts of random tokens, the same at every check: no model is sure of what follows them, so that the
    log-probabilities depend on all of its weights."""
    chance = numpy.random.default_rng(_SEED)
    longest = min(CHECK.longest_prompt, max_prompt_tokens)
    lengths = [max(1, longest - key * longest // CHECK.prompts) for key in range(CHECK.prompts)]
    return [Request(chance.integers(num_ids, size=length).tolist(), key) for key, length in enumerate(lengths)]


def training_log_probs(learner: Learner, config: Config, completions: Sequence[Completion]) -> list[Tensor]:
    """``[n]`` of each completion, by the training's forward, with the experts of the rollout where it reports them.

    A collective call; every data-parallel rank computes the same. The result is that of this rank's replica.
    """
    state, table = learner.state, learner.table
    dtype = torch.float64 if config.train.dtype == "float64" else torch.float32
    form = Form(False, state.size("tp"), dtype, state.device)
    samples = [
        Sample(i, c.prompt, c.tokens, 0.0, c.log_probs, experts=c.experts or {}) for i, c in enumerate(completions)
    ]
    size = config.train.microbatch_size
    chunks = [samples[i : i + size] for i in range(0, len(samples), size)]
    # A schedule is for so many microbatches: where they are more, the first ones come again.
    rounds = -(-len(chunks) // table.num_microbatches)
    found: dict[int, Tensor] = {}
    for number in range(rounds):
        places = [(number * table.num_microbatches + i) % len(chunks) for i in range(table.num_microbatches)]
        for place, log_probs in zip(places, _forward(learner, config, form, [chunks[i] for i in places]), strict=True):
            for sample, values in zip(chunks[place], log_probs, strict=True):
                found[sample.index] = values
    return [found[i] for i in range(len(samples))]


def _forward(learner: Learner, config: Config, form: Form, chunks: Sequence[Sequence[Sample]]) -> list[list[Tensor]]:
    microbatches = [Microbatch(chunk, form) for chunk in chunks]
    heads = [LogProbHead(microbatch, config.rl.temperature) for microbatch in microbatches]
    batches = []
    for number, (microbatch, head) in enumerate(zip(microbatches, heads, strict=True)):
        layers = _layers_of(learner, config, number) if microbatch.samples[0].experts else []
        batches.append(microbatch.batch(head, layers))
    learner.executor.run(batches, forward_only=True)
    learner.reshard()
    found = []
    for microbatch, head in zip(microbatches, heads, strict=True):
        log_probs = microbatch.zeros() if head.log_probs is None else head.log_probs
        if learner.state.size("pp") > 1:  # only the rank with the last stage has them
            dist.all_reduce(log_probs, group=learner.state.group("pp"))
        found.append(microbatch.split(log_probs))
    return found


def _layers_of(learner: Learner, config: Config, microbatch: int) -> list[int]:
    """The MoE layers of this rank that a microbatch goes through."""
    found: list[int] = []
    for action in learner.table.actions(learner.state.rank_in("pp")):
        if action.kind is Kind.F and action.microbatch == microbatch:
            layers = dict(learner.stages[action.stage].get_submodule("layers").named_children())
            found += [int(layer) for layer in layers if config.model.is_moe_layer(int(layer))]
    return found


def greatest_difference(completions: Sequence[Completion], ours: Sequence[Tensor]) -> float:
    """Of any log-probability; NaN where one is."""
    parts = [(c.log_probs - mine.to(torch.float32)).abs() for c, mine in zip(completions, ours, strict=True)]
    return torch.cat(parts).max().item()
