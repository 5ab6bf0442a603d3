"""From prompts to rewarded completions: what a rollout brings home, group by group."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from r1mega.config import Config, ConfigError
from r1mega.data.tokenizer import Tokenizer
from r1mega.parallel_state import ParallelState
from r1mega.rl import rewards
from r1mega.rl.advantages import group_advantages
from r1mega.rl.prompts import Prompt, apply_template, prompt_index, read_prompts
from r1mega.rl.rollout.engine import Completion, Request, RolloutEngine, Sampling
from r1mega.rl.samples import Sample

WAIT_SECONDS = 60.0  # ranks that wait for rewards hear from the others so often, which no timeout takes for a loss
ROUND = 1 << 40  # places in the run of a round of dynamic sampling are this far from those of the round before


@dataclass
class Group:
    """The completions of one prompt.

    Args:
        place: of the prompt in the rollout, over all data-parallel ranks.
        prompt: the prompt.
        text: what the model was given, template included.
        completions: as they were generated.
        totals: reward of each.
        scores: rewards by name, on the rank that computed them; empty elsewhere.
        advantages: of each.
        std: standard deviation of the rewards.
        is_flat: all rewards are equal.
    """

    place: int
    prompt: Prompt
    text: str
    completions: list[Completion]
    totals: list[float]
    scores: list[rewards.Scores]
    advantages: list[float] = field(default_factory=list)
    std: float = 0.0
    is_flat: bool = False


class Experience:
    """Generates completions and has them rewarded while others are still being generated.

    Args:
        config: the job.
        state: the layout's groups. The first rank of each model replica (``tp_pp``) computes its rewards.
        engine: what generates.
        tokenizer: of the model.
    """

    def __init__(self, config: Config, state: ParallelState, engine: RolloutEngine, tokenizer: Tokenizer) -> None:
        self.config, self.state, self.engine, self.tokenizer = config, state, engine, tokenizer
        self.prompts = read_prompts([str(config.rl.prompts)])
        self.is_leader = state.rank_in("tp_pp") == 0
        self.pool = None
        if self.is_leader:
            self.pool = rewards.RewardPool(reward_options(config), config.rl.reward.workers)

    def make(self, rollout: int) -> list[Group]:
        """The groups of this data-parallel rank's prompts in rollout number ``rollout``. A collective call."""
        rl = self.config.rl
        mine = self.slice_of(num_prompts(self.config))
        first = rollout * num_prompts(self.config)
        groups: dict[int, Group] = {}
        wanted = list(mine)
        for attempt in range(rl.dynamic_sampling + 1):
            keys = [attempt * ROUND + first + place for place in wanted]
            prompts = [self._prompt(key) for key in keys]
            sampling = self._sampling(rl.temperature, rl.top_p)
            found = self.generate(prompts, keys, rl.group_size, sampling)
            groups |= {place: _with_place(group, place) for place, group in zip(wanted, found, strict=True)}
            self._compare([groups[place] for place in wanted])
            wanted = [place for place in wanted if groups[place].is_flat]
            if attempt == rl.dynamic_sampling or not self._anywhere(bool(wanted)):
                break
        return [groups[place] for place in mine]

    def generate(
        self, prompts: Sequence[Prompt], keys: Sequence[int], num_samples: int, sampling: Sampling
    ) -> list[Group]:
        """Completions and their rewards; no advantages yet. A collective call."""
        texts = [apply_template(self.config.rl.template, prompt.prompt) for prompt in prompts]
        requests = [
            Request(self.tokenizer.encode(text, bos=True), key, num_samples)
            for text, key in zip(texts, keys, strict=True)
        ]
        by_key = dict(zip(keys, zip(prompts, texts, strict=True), strict=True))
        futures: dict[tuple[int, int], Future[rewards.Scores]] = {}

        def submit(completion: Completion) -> None:
            if self.pool is not None:
                sample = self._reward_sample(completion, *by_key[completion.key])
                futures[completion.key, completion.sample] = self.pool.submit(sample)

        completions = self.engine.generate(requests, sampling, submit)
        self._wait_for(futures.values())
        scores = [futures[c.key, c.sample].result() for c in completions] if self.pool is not None else []
        totals = self._share([score.total for score in scores], len(completions))
        groups = []
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            part = slice(i * num_samples, (i + 1) * num_samples)
            groups.append(Group(i, prompt, text, completions[part], totals[part], scores[part]))
        return groups

    def samples(self, groups: Sequence[Group]) -> list[Sample]:
        """What training needs of them."""
        rl, found = self.config.rl, []
        for group in groups:
            for i, (completion, advantage) in enumerate(zip(group.completions, group.advantages, strict=True)):
                found.append(
                    Sample(
                        index=group.place * rl.group_size + i,
                        prompt=completion.prompt,
                        tokens=completion.tokens,
                        advantage=advantage if rl.algorithm == "grpo" else group.totals[i],
                        rollout_log_probs=completion.log_probs,
                        in_loss=completion.finished or rl.overlong == "keep",
                        experts=completion.experts or {},
                    )
                )
        return found

    def slice_of(self, count: int) -> range:
        """Which of ``count`` prompts are this data-parallel rank's."""
        dp, rank = self.state.size("dp"), self.state.rank_in("dp")
        return range(count * rank // dp, count * (rank + 1) // dp)

    def close(self) -> None:
        """End the engine and the reward workers."""
        self.engine.close()
        if self.pool is not None:
            self.pool.close()

    def decode(self, completion: Completion) -> str:
        """The text of a completion, without its end-of-document token."""
        tokens = completion.tokens[:-1] if completion.finished else completion.tokens
        return self.tokenizer.decode(tokens)

    def _prompt(self, place: int) -> Prompt:
        """That of ``place`` in the run."""
        return self.prompts[prompt_index(self.config.train.seed, place, len(self.prompts))]

    def _sampling(self, temperature: float, top_p: float = 1.0) -> Sampling:
        rl = self.config.rl
        return Sampling(temperature, top_p, rl.max_new_tokens, self.config.train.seed, (self.tokenizer.eos_id,))

    def _reward_sample(self, completion: Completion, prompt: Prompt, text: str) -> rewards.Sample:
        data = prompt.data | {"num_tokens": len(completion.tokens)}
        return rewards.Sample(text, self.decode(completion), prompt.reference, data)

    def _compare(self, groups: Sequence[Group]) -> None:
        if not groups:
            return
        found = group_advantages(
            torch.tensor([g.totals for g in groups], dtype=torch.float64), self.config.rl.advantage
        )
        for i, group in enumerate(groups):
            group.advantages = found.advantages[i].tolist()
            group.std, group.is_flat = float(found.std[i]), bool(found.flat[i])

    def _wait_for(self, futures: Collection[Future[rewards.Scores]]) -> None:
        """Until all ranks have their rewards, which may take longer than a message is waited for."""
        while self._anywhere(bool(wait(futures, timeout=WAIT_SECONDS).not_done)):
            pass

    def _share(self, totals: list[float], count: int) -> list[float]:
        """The leader's rewards on all ranks of its model replica."""
        if self.state.size("tp_pp") == 1:
            return totals
        values = torch.tensor(totals if totals else [0.0] * count, dtype=torch.float64, device=self.state.device)
        dist.broadcast(values, src=self.state.ranks("tp_pp")[0], group=self.state.group("tp_pp"))
        return values.tolist()

    def _anywhere(self, value: bool) -> bool:
        flag = torch.tensor([int(value)], device=self.state.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def num_prompts(config: Config) -> int:
    """Prompts of one rollout, over all ranks."""
    return config.rl.minibatches * config.train.global_batch_size // config.rl.group_size


def reward_options(config: Config) -> rewards.RewardOptions:
    """The settings of the rewards, checked. Raises :class:`r1mega.config.ConfigError`."""
    reward = config.rl.reward
    with with_names_of_settings():
        return rewards.RewardOptions(
            reward.names, reward.weights or [], reward.arguments, reward.time_limit, reward.memory_limit
        )


@contextmanager
def with_names_of_settings() -> Iterator[None]:
    """Errors of rewards, which know nothing of a run, with the names that the settings have there."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(re.sub(r"^rewards\.", "rl.reward.", str(error))) from error


def _with_place(group: Group, place: int) -> Group:
    group.place = place
    return group
