"""GRPO: the program of one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1mega.config import Config, ConfigError, require
from r1mega.data.tokenizer import Tokenizer
from r1mega.data.tokenizer_check import check_tokenizer
from r1mega.kernels import native
from r1mega.model.huggingface import resolve_model_config
from r1mega.parallel_state import Layout, ParallelState
from r1mega.rl.completions import drop_after, write_completions
from r1mega.rl.evaluator import Evaluator, drop_evaluations, keep_evaluation, read_evaluations
from r1mega.rl.experience import Experience, Group, num_prompts, reward_options, with_names_of_settings
from r1mega.rl.prompts import apply_template, read_prompts
from r1mega.rl.rewards import check_rewards
from r1mega.rl.trainer import GrpoTrainer
from r1mega.settings import world_size_from_environment
from r1mega.train.metrics import METRICS_FILE, MetricsWriter, read_metrics
from r1mega.train.program import run_program
from r1mega.train.progress import ProgressPrinter, duration
from r1mega.train.run_folder import CHECKPOINT_FOLDER
from r1mega.train.schedule import check_pipeline

FIELDS = (("format", "reward/format", 3), ("length", "response_length", 1), ("KL", "kl", 4), ("entropy", "entropy", 3))
SHOWN = 2
SHOWN_CHARACTERS = 300


def grpo(config: Config) -> int:
    """Train as ``config`` says; returns the exit status. torchrun's environment says which rank this is.

    Raises:
        ConfigError: a setting or a file does not fit. Nearly all are found before a process group is made.
    """
    return run_program(check_settings(config, world_size_from_environment()), run)


def check_settings(config: Config, world_size: int) -> Config:
    """Check all that can be checked without another process.

    Returns:
        The settings with the model of ``model.checkpoint``, and with what RL decides: the length of the longest
        sequence, and the rate of the routers' biases.

    Raises:
        ConfigError: one line, for what does not fit.
    """
    rl = config.rl
    model = resolve_model_config(config.model)
    moe = dataclasses.replace(model.moe, bias_update_rate=rl.bias_update_rate)
    model = dataclasses.replace(model, value_head=rl.algorithm == "ppo", moe=moe)
    length = rl.max_tokens + -rl.max_tokens % config.parallel.tp
    tokenizer = config.data.tokenizer or config.model.checkpoint
    data = dataclasses.replace(config.data, sequence_length=length, tokenizer=tokenizer)
    config = dataclasses.replace(config, model=model, data=data)
    _check_rl(config)
    config.validate(world_size)
    check_pipeline(config, world_size)
    dp = Layout.from_config(config.parallel, world_size).dp
    prompts = num_prompts(config)
    what_fits = (
        f"x train.global_batch_size / rl.group_size are {prompts} prompts, fewer than data-parallel ranks ({dp})"
    )
    require(prompts >= dp, "rl.minibatches", rl.minibatches, what_fits)
    _check_files(config)
    if rl.engine == "vllm":
        from r1mega.rl.rollout.vllm import check_settings as check_vllm

        check_vllm(config)
    return config


def _check_rl(config: Config) -> None:
    rl, moe, train = config.rl, config.model.moe, config.train
    samples = rl.minibatches * train.global_batch_size
    what_fits = f"must divide rl.minibatches x train.global_batch_size ({samples})"
    require(samples % rl.group_size == 0, "rl.group_size", rl.group_size, what_fits)
    what_fits = f"must be a multiple of rl.minibatches ({rl.minibatches}), the steps of a rollout"
    require(train.num_steps % rl.minibatches == 0, "train.num_steps", train.num_steps, what_fits)
    for name in ("reference_interval", "eval_interval"):
        require(getattr(rl, name) % rl.minibatches == 0, f"rl.{name}", getattr(rl, name), what_fits)
    interval = train.checkpoint_interval
    require(interval % rl.minibatches == 0, "train.checkpoint_interval", interval, what_fits)
    if moe.num_experts:
        for name in ("aux_loss_coefficient", "z_loss_coefficient"):
            what_fits = "must be 0 in RL: its objective is the only loss"
            require(getattr(moe, name) == 0, f"model.moe.{name}", getattr(moe, name), what_fits)
        what_fits = "must be null in RL: what is dropped would depend on what stands beside it"
        require(moe.capacity_factor is None, "model.moe.capacity_factor", moe.capacity_factor, what_fits)
    longest, limit = rl.max_prompt_tokens + rl.max_new_tokens, config.model.max_position
    what_fits = f"with rl.max_prompt_tokens ({rl.max_prompt_tokens}) must be at most model.max_position ({limit})"
    require(longest <= limit, "rl.max_new_tokens", rl.max_new_tokens, what_fits)
    names = rl.reward.names
    if rl.eval_prompts is not None:
        what_fits = f"must be one of rl.reward.names ({', '.join(names)})"
        require(rl.reward.correct in names, "rl.reward.correct", rl.reward.correct, what_fits)


def _check_files(config: Config) -> None:
    rl = config.rl
    if rl.prompts is None:
        raise ConfigError('rl.prompts=null: name a JSONL file of {"prompt": ..., "reference": ...}')
    if config.data.tokenizer is None:
        raise ConfigError("data.tokenizer=null: name a tokenizer, or a model.checkpoint that has one")
    tokenizer = check_tokenizer(config)
    assert tokenizer is not None
    options = reward_options(config)
    with with_names_of_settings():
        check_rewards(options)
    for name, path in (("rl.prompts", rl.prompts), ("rl.eval_prompts", rl.eval_prompts)):
        if path is not None:
            _check_prompts(name, path, config, tokenizer, options.needs())


def _check_prompts(name: str, path: str, config: Config, tokenizer: Tokenizer, needs: list[str]) -> None:
    """A prompt that is too long is no prompt with its end cut off."""
    longest = config.rl.max_prompt_tokens
    for prompt in read_prompts([path], needs, name):
        length = len(tokenizer.encode(apply_template(config.rl.template, prompt.prompt), bos=True))
        if length == 0:
            raise ConfigError(f"{name}={path}: data.tokenizer makes no token of the prompt {prompt.prompt[:40]!r}")
        what_fits = f"must be at least {length}, the tokens of a prompt of {name} ({prompt.prompt[:40]!r}...)"
        require(length <= longest, "rl.max_prompt_tokens", longest, what_fits)


def run(config: Config, state: ParallelState, checkpoint: Path | None) -> None:
    """Train to the last step, then report. A collective call."""
    trainer = GrpoTrainer(config, state, checkpoint)
    try:
        _train(trainer)
    finally:  # the threads of the pool would keep a failed run waiting for rewards that nobody wants
        trainer.experience.close()


def _train(trainer: GrpoTrainer) -> None:
    config, state = trainer.config, trainer.state
    folder = Path(config.train.output_dir)
    evaluator = Evaluator(config, trainer.experience) if config.rl.eval_prompts is not None else None
    fields = (("reward", "reward", 3), ("accuracy", f"reward/{config.rl.reward.correct}", 3), *FIELDS)
    printer = ProgressPrinter(config.train.num_steps, fields=fields, steps_per_line=config.rl.minibatches)
    if state.rank == 0:
        drop_after(folder, trainer.progress.step)
        drop_evaluations(folder, trainer.progress.step)
        writer = MetricsWriter(folder, trainer.progress.step)
        _announce(trainer, printer)
    if evaluator is not None and trainer.progress.step == 0:
        _evaluate(evaluator, 0, folder, printer)
    while trainer.progress.step < config.train.num_steps:
        first = trainer.progress.step + 1
        metrics, groups = trainer.step()
        if trainer.experience.is_leader:
            lines = completion_lines(first, groups, trainer.experience)
            write_completions(folder, first, state.rank_in("dp"), lines)
        step = trainer.progress.step
        if state.rank == 0:
            writer.write(metrics)
            printer.step(metrics)
            _warn_of_failures(step, metrics, groups, printer)
            if _is_due(config.rl.show_interval, first, step, config, at_end=False):
                _show(step, groups, trainer.experience, printer)
        if evaluator is not None and _is_due(config.rl.eval_interval, first, step, config):
            _evaluate(evaluator, step, folder, printer)
        if _is_due(config.train.checkpoint_interval, first, step, config):
            if state.rank == 0:
                writer.sync()
            trainer.save()
    trainer.finish()
    if state.rank == 0:
        writer.close()
        _report(config, folder)


def completion_lines(step: int, groups: list[Group], experience: Experience) -> list[dict[str, object]]:
    """What is kept of completions, one JSON object each."""
    found: list[dict[str, object]] = []
    for group in groups:
        for i, (completion, total, score) in enumerate(zip(group.completions, group.totals, group.scores, strict=True)):
            found.append(
                {
                    "step": step,
                    "prompt_index": group.place,
                    "sample": i,
                    "prompt": group.text,
                    "completion": experience.decode(completion),
                    "reference": group.prompt.reference,
                    "reward": total,
                    "rewards": score.by_name,
                    "failures": score.failures,
                    "advantage": group.advantages[i],
                    "finished": completion.finished,
                    "num_tokens": len(completion.tokens),
                }
            )
    return found


def _is_due(interval: int, first: int, last: int, config: Config, at_end: bool = True) -> bool:
    """Whether something that happens every ``interval`` steps (0: never), and at the end, happens in these steps."""
    is_end = at_end and last == config.train.num_steps
    return is_end or (interval > 0 and last // interval > (first - 1) // interval)


def _announce(trainer: GrpoTrainer, printer: ProgressPrinter) -> None:
    config, state = trainer.config, trainer.state
    sizes = " ".join(f"{name}={state.size(name)}" for name in ("dp", "tp", "pp", "ep", "etp"))
    begun = f", going on after step {trainer.progress.step}" if trainer.progress.step else ""
    prompts, size = num_prompts(config), config.rl.group_size
    printer.message(
        f"r1mega: {state.layout.world_size} process{'es' * (state.layout.world_size > 1)} ({sizes}) on "
        f"{state.device.type}, {config.train.dtype}, GRPO: {prompts} prompts x {size} completions a rollout, "
        f"{config.train.num_steps} steps to {config.train.output_dir}{begun}"
    )
    if native.library is None and state.device.type == "cpu":
        printer.message(f"r1mega: PyTorch's operations instead of C++ kernels: {native.reason}")


def _evaluate(evaluator: Evaluator, step: int, folder: Path, printer: ProgressPrinter) -> None:
    record = evaluator.evaluate(step)
    if evaluator.state.rank == 0:
        keep_evaluation(folder, record)
        printer.message(f"evaluation after step {step}: {describe(record)}")


def describe(record: dict) -> str:
    """An evaluation in words."""
    sampled = f"pass@1 {record['pass@1']:.3f} at temperature {record['temperature']:g}"
    parts = [sampled, f"greedy {record['greedy']:.3f}"]
    parts += [f"{name} {value:.3f}" for name, value in record.items() if name.startswith("cons@")]
    parts += [f"{name} {record[name]:.3f}" for name in ("format",) if name in record]
    return ", ".join([*parts, f"{record['response_length']:.1f} tokens"])


def _warn_of_failures(
    step: int, metrics: Mapping[str, int | float], groups: Sequence[Group], printer: ProgressPrinter
) -> None:
    """Rewards that failed count as 0, which must not go unseen."""
    prefix = "reward_failures/"
    for name, count in metrics.items():
        if name.startswith(prefix) and count:
            reward = name.removeprefix(prefix)
            found = (score.failures[reward] for g in groups for score in g.scores if reward in score.failures)
            why = next(found, "on another rank; see completions")
            printer.message(f"  step {step}: reward {reward} failed {count:.0f} times and counted as 0: {_plain(why)}")


def _show(step: int, groups: list[Group], experience: Experience, printer: ProgressPrinter) -> None:
    """A few completions of the rollout, with what they were rewarded."""
    for group in groups[:SHOWN]:
        text = experience.decode(group.completions[0])
        rewards = " ".join(f"{name}={value:g}" for name, value in group.scores[0].by_name.items())
        shown = _plain(f"{group.prompt.prompt}{text}")
        printer.message(f"  sample of step {step}: {shown}  [{rewards}, reference {group.prompt.reference}]")


def _plain(text: str) -> str:
    """One line, without what a terminal would take for a command."""
    line = " ".join(text.split())[:SHOWN_CHARACTERS]
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def _report(config: Config, folder: Path) -> None:
    """The summary and the pictures."""
    from r1mega.rl.pictures import plot_run

    metrics, records = read_metrics(folder / METRICS_FILE), read_evaluations(folder)
    pictures = plot_run(metrics, records, folder, correct=f"reward/{config.rl.reward.correct}")
    seconds = sum(line["step_seconds"] for line in metrics)
    lines = [f"done: {config.train.num_steps} steps in {duration(seconds)}"]
    if records:
        lines.append(f"  {'before':<18}{describe(records[0])}")
        lines.append(f"  {'after':<18}{describe(records[-1])}")
    if metrics:
        lines.append(f"  {'reward':<18}{metrics[0]['reward']:.3f} -> {metrics[-1]['reward']:.3f}")
    lines.append(f"  {'checkpoint':<18}{folder / CHECKPOINT_FOLDER}")
    lines += [f"  {'picture':<18}{path}" for path in pictures]
    lines.append(f"  {'completions':<18}{folder / 'completions'}")
    lines.append(f"  {'metrics':<18}{folder / METRICS_FILE}")
    print("\n" + "\n".join(lines), flush=True)
