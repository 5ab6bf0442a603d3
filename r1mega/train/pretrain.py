"""Pre-training: the program of one rank."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from r1mega.config import Config
from r1mega.data.check import check_data
from r1mega.kernels import cuda, native
from r1mega.model.huggingface import resolve_model_config
from r1mega.parallel_state import ParallelState
from r1mega.settings import world_size_from_environment
from r1mega.train.metrics import METRICS_FILE, MetricsWriter, plot_expert_load, plot_loss, read_metrics
from r1mega.train.program import run_program
from r1mega.train.progress import ProgressPrinter
from r1mega.train.run_folder import LOAD_PICTURE, LOSS_PICTURE
from r1mega.train.sampling import sample_text
from r1mega.train.schedule import check_pipeline
from r1mega.train.summary import summary
from r1mega.train.trainer import Trainer


def pretrain(config: Config) -> int:
    """Train as ``config`` says; returns the exit status. torchrun's environment says which rank this is.

    Raises:
        ConfigError: a setting or a file does not fit. Nearly all are found before a process group is made.
    """
    return run_program(check_settings(config), run)


def check_settings(config: Config) -> Config:
    """Check all that can be checked without another process; the settings with the model of ``model.checkpoint``."""
    config = dataclasses.replace(config, model=resolve_model_config(config.model))
    config.validate(world_size_from_environment())
    check_pipeline(config, world_size_from_environment())
    check_data(config, contents=os.environ.get("LOCAL_RANK", "0") == "0")
    return config


def run(config: Config, state: ParallelState, checkpoint: Path | None) -> None:
    """Train to the last step, then report. A collective call."""
    folder = Path(config.train.output_dir)
    printer = ProgressPrinter(config.train.num_steps)
    if state.rank == 0:
        printer.message("r1mega: building the model, ordering the data")
    trainer = Trainer(config, state, checkpoint)
    if state.rank == 0:
        writer = MetricsWriter(folder, trainer.progress.step)
        _announce(trainer, printer)
    while trainer.progress.step < config.train.num_steps:
        metrics = trainer.step()
        if _is_due(config.train.valid_interval, trainer) and (loss := trainer.validate()) is not None:
            metrics["valid_loss"] = loss
        if state.rank == 0:
            writer.write(metrics)
            printer.step(metrics)
        if _is_due(config.train.checkpoint_interval, trainer):
            if state.rank == 0:
                writer.sync()
            trainer.save()
    if state.rank == 0:
        printer.message("r1mega: writing the last checkpoint" + ", sampling a text" * _samples(trainer))
    trainer.close()
    text = _sample(trainer)
    loads = _gather_loads(trainer)
    if state.rank == 0:
        writer.close()
        lines = read_metrics(folder / METRICS_FILE)
        plot_loss(lines, folder / LOSS_PICTURE)
        if loads:
            plot_expert_load(loads, folder / LOAD_PICTURE, lines)
        print("\n" + summary(folder, config.train.sample_prompt, text), flush=True)


def _is_due(interval: int, trainer: Trainer) -> bool:
    """Whether something that happens every ``interval`` steps (0: never), and at the end, happens now."""
    step = trainer.progress.step
    return step == trainer.config.train.num_steps or (interval > 0 and step % interval == 0)


def _announce(trainer: Trainer, printer: ProgressPrinter) -> None:
    config, state = trainer.config, trainer.state
    sizes = " ".join(f"{name}={state.size(name)}" for name in ("dp", "tp", "pp", "ep", "etp"))
    begun = f", going on after step {trainer.progress.step}" if trainer.progress.step else ""
    steps = f"{config.train.num_steps} step{'s' * (config.train.num_steps > 1)}"
    printer.message(
        f"r1mega: {state.layout.world_size} process{'es' * (state.layout.world_size > 1)} ({sizes}) on "
        f"{state.device.type}, {config.train.dtype}, {steps} to {config.train.output_dir}{begun}"
    )
    if native.library is None and state.device.type == "cpu":
        printer.message(f"r1mega: PyTorch's operations instead of C++ kernels: {native.reason}")
    if cuda.library is None and state.device.type == "cuda":
        printer.message(f"r1mega: Triton's or PyTorch's routing instead of CUDA kernels: {cuda.reason}")


def _samples(trainer: Trainer) -> bool:
    return trainer.config.train.sample_prompt is not None and trainer.tokenizer is not None


def _sample(trainer: Trainer) -> str | None:
    config = trainer.config
    if config.train.sample_prompt is None or trainer.tokenizer is None:
        return None
    return sample_text(
        trainer.learner.stages,
        trainer.learner.table,
        trainer.state,
        trainer.tokenizer,
        config.train.sample_prompt,
        config.train.sample_tokens,
        config.model.max_position,
        config.train.seed,
    )


def _gather_loads(trainer: Trainer) -> dict[str, list[int]]:
    """Tokens of each expert over the last steps, by router, of all stages; on rank 0."""
    mine: dict[str, Tensor] = {}
    for loads in trainer.recent_loads:
        for name, load in loads.items():
            mine[name] = mine.get(name, 0) + load.cpu()
    everyone: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine if trainer.state.rank_in("tp_dp_cp") == 0 else {})
    return {name: load.tolist() for loads in everyone for name, load in loads.items()}
