"""How good the policy is on prompts that it does not train on: pass@1 and cons@k of samples, and greedy accuracy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from r1mega.config import Config
from r1mega.files import write_whole
from r1mega.rl.evaluation import cons_at_k, mean_length, pass_at_1, reflection_words
from r1mega.rl.experience import Experience, Group
from r1mega.rl.prompts import read_prompts
from r1mega.rl.rewards.answers import extract_answer
from r1mega.rl.rollout.engine import Sampling
from r1mega.train.metrics import read_metrics, truncate

EVALUATIONS_FILE = "evaluations.jsonl"
KEYS = 1 << 50  # far from those of training, and the same in each evaluation: differences are the policy's


@dataclass
class Outcome:
    """What the samples of the prompt at ``place`` were, and whether the greedy completion was right."""

    place: int
    texts: list[str]
    correct: list[bool]
    greedy: bool
    formatted: list[float]
    lengths: list[int]


class Evaluator:
    """Evaluates on the prompts of ``rl.eval_prompts``.

    Args:
        config: the job.
        experience: what generates and rewards.
    """

    def __init__(self, config: Config, experience: Experience) -> None:
        self.config, self.experience, self.state = config, experience, experience.state
        self.prompts = read_prompts([str(config.rl.eval_prompts)])

    def evaluate(self, step: int) -> dict[str, int | float]:
        """A record of the policy as it is, the same on every rank. A collective call."""
        rl, state = self.config.rl, self.state
        mine = self.experience.slice_of(len(self.prompts))
        prompts, keys = [self.prompts[i] for i in mine], [KEYS + i for i in mine]
        stop = (self.experience.tokenizer.eos_id,)
        sampled = Sampling(rl.eval_temperature, rl.top_p, rl.max_new_tokens, self.config.train.seed, stop)
        greedy = Sampling(0.0, 1.0, rl.max_new_tokens, self.config.train.seed, stop)
        self.experience.engine.sync_weights()
        groups = self.experience.generate(prompts, keys, rl.eval_samples, sampled)
        best = self.experience.generate(prompts, keys, 1, greedy)
        outcomes = []
        if self.experience.is_leader:
            outcomes = [self._outcome(i, *pair) for i, *pair in zip(mine, groups, best, strict=True)]
        everyone = [outcomes] * state.layout.world_size
        if len(everyone) > 1:
            dist.all_gather_object(everyone, outcomes)
        return self._record(step, sorted((o for part in everyone for o in part), key=lambda outcome: outcome.place))

    def _outcome(self, place: int, group: Group, greedy: Group) -> Outcome:
        name = self.config.rl.reward.correct
        return Outcome(
            place,
            [self.experience.decode(completion) for completion in group.completions],
            [score.by_name[name] == 1.0 for score in group.scores],
            greedy.scores[0].by_name[name] == 1.0,
            [score.by_name["format"] for score in group.scores if "format" in score.by_name],
            [len(completion.tokens) for completion in group.completions],
        )

    def _record(self, step: int, outcomes: list[Outcome]) -> dict[str, int | float]:
        correct = [outcome.correct for outcome in outcomes]
        answers = [[extract_answer(text) for text in outcome.texts] for outcome in outcomes]
        record: dict[str, int | float] = {
            "step": step,
            "prompts": len(outcomes),
            "samples": self.config.rl.eval_samples,
            "temperature": self.config.rl.eval_temperature,
            "pass@1": pass_at_1(correct),
            f"cons@{self.config.rl.eval_samples}": cons_at_k(answers, correct),
            "greedy": sum(outcome.greedy for outcome in outcomes) / len(outcomes),
            "response_length": mean_length([length for outcome in outcomes for length in outcome.lengths]),
            "reflection_words": reflection_words([text for outcome in outcomes for text in outcome.texts]),
        }
        if formatted := [value for outcome in outcomes for value in outcome.formatted]:
            record["format"] = sum(formatted) / len(formatted)
        return record


def read_evaluations(folder: Path) -> list[dict]:
    """The records of the run in ``folder``."""
    return read_metrics(folder / EVALUATIONS_FILE)


def drop_evaluations(folder: Path, step: int) -> None:
    """Remove the records of steps after ``step``, which a run that goes on from there makes again."""
    truncate(folder / EVALUATIONS_FILE, step)


def keep_evaluation(folder: Path, record: dict[str, int | float]) -> None:
    """Add a record to the run's, in place of what it had for this step and those after it."""
    kept = [line for line in read_evaluations(folder) if line["step"] < record["step"]]
    write_whole(folder / EVALUATIONS_FILE, "".join(json.dumps(line) + "\n" for line in [*kept, record]))
