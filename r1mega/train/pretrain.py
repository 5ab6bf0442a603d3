"""Pre-training: the program of one rank."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from r1mega.config import Config
from r1mega.data.check import check_data
from r1mega.kernels import cuda, native
from r1mega.model.huggingface import resolve_model_config
from r1mega.parallel_state import Layout, ParallelState
from r1mega.settings import is_first_rank, world_size_from_environment
from r1mega.train.checkpoint import CheckpointError
from r1mega.train.learner import TrainingError
from r1mega.train.metrics import METRICS_FILE, MetricsWriter, plot_expert_load, plot_loss, read_metrics
from r1mega.train.process_group import Peers, start_process_group
from r1mega.train.progress import ProgressPrinter
from r1mega.train.run_folder import LOAD_PICTURE, LOSS_PICTURE, lock_folder, prepare_folder
from r1mega.train.sampling import sample_text
from r1mega.train.schedule import check_pipeline
from r1mega.train.summary import summary
from r1mega.train.trainer import Trainer


def pretrain(config: Config) -> int:
    """Train as ``config`` says; returns the exit status. torchrun's environment says which rank this is.

    Raises:
        ConfigError: a setting or a file does not fit. Nearly all are found before a process group is made.
    """
    config = check_settings(config)
    if not is_first_rank():
        return _train(config, None)
    with lock_folder(config):
        return _train(config, prepare_folder(config))


def _train(config: Config, checkpoint: Path | None) -> int:
    """Start the process group and run; ``checkpoint`` is rank 0's finding, for all."""
    device = start_process_group()
    peers = Peers()
    try:
        state = ParallelState(Layout.from_config(config.parallel, dist.get_world_size()), device)
        with _quiet_threads():
            run(config, state, _from_first_rank(checkpoint))
        status = 0
    except (CheckpointError, TrainingError) as error:
        status = 1
        if state.rank == 0:
            print(f"r1mega: error: {error}", file=sys.stderr, flush=True)
        # torchrun kills the job when the first process ends, which must not be before rank 0 has spoken.
        dist.barrier()
    except (OSError, RuntimeError) as error:
        # A file that cannot be written is this rank's alone: the others see it as a peer that was lost.
        cause = _file_error(error) if isinstance(error, OSError) else peers.explain(error)
        if cause is None:
            raise
        print(f"r1mega: error: rank {dist.get_rank()} stops: {cause}", file=sys.stderr, flush=True)
        # Threads that wait for the lost peer would keep an ordinary exit waiting.
        os._exit(1)
    dist.destroy_process_group()
    return status


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """No traceback of a background thread that cannot write its file: TensorBoard's raises again where it is used."""
    usual = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            usual(failure)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


def _file_error(error: OSError) -> str:
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


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
    trainer = Trainer(config, state, checkpoint)
    if state.rank == 0:
        writer = MetricsWriter(folder, trainer.progress.step)
        printer = ProgressPrinter(config.train.num_steps)
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
    printer.message(
        f"r1mega: {state.layout.world_size} process{'es' * (state.layout.world_size > 1)} ({sizes}) on "
        f"{state.device.type}, {config.train.dtype}, {config.train.num_steps} steps to {config.train.output_dir}{begun}"
    )
    if native.library is None and state.device.type == "cpu":
        printer.message(f"r1mega: PyTorch's operations instead of C++ kernels: {native.reason}")
    if cuda.library is None and state.device.type == "cuda":
        printer.message(f"r1mega: Triton's or PyTorch's routing instead of CUDA kernels: {cuda.reason}")


def _from_first_rank(checkpoint: Path | None) -> Path | None:
    """What rank 0 has found, on every rank."""
    found = [checkpoint]
    dist.broadcast_object_list(found, src=0)
    return found[0]


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
