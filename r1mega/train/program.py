"""The frame of a training program: the output folder, the process group, and errors said clearly at the end."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from r1mega.config import Config
from r1mega.parallel_state import Layout, ParallelState
from r1mega.settings import is_first_rank
from r1mega.stopping import say, wait_for_torchrun
from r1mega.train.checkpoint import CheckpointError
from r1mega.train.learner import TrainingError
from r1mega.train.process_group import Peers, start_process_group
from r1mega.train.run_folder import lock_folder, prepare_folder

Run = Callable[[Config, ParallelState, Path | None], None]


def run_program(config: Config, run: Run) -> int:
    """Call ``run(config, state, checkpoint)`` on every rank, with the groups made; returns the exit status.

    A process group that is there already is used, and left for the program that comes next.

    Args:
        config: the job, checked.
        run: the work; a collective call. The checkpoint is the one to go on from.

    Raises:
        ConfigError: the output folder does not fit. Found before a process group is made.
    """
    if not is_first_rank():
        return _start(config, None, run)
    with lock_folder(config):
        return _start(config, prepare_folder(config), run)


def _start(config: Config, checkpoint: Path | None, run: Run) -> int:
    """Start the process group and run; ``checkpoint`` is rank 0's finding, for all."""
    is_own = not dist.is_initialized()
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
            say(str(error))
        # torchrun kills the job when the first process ends, which must not be before rank 0 has spoken.
        dist.barrier()
    except (OSError, RuntimeError) as error:
        # A file that cannot be written is this rank's alone: the others see it as a peer that was lost.
        cause = _file_error(error) if isinstance(error, OSError) else peers.explain(error)
        if cause is None:
            raise
        is_lost_peer = not isinstance(error, OSError)
        say(f"rank {dist.get_rank()} stops: {cause}", known_to_launcher=is_lost_peer and bool(peers.dead()))
        if is_lost_peer:
            wait_for_torchrun()
        # Threads that wait for the lost peer would keep an ordinary exit waiting.
        os._exit(1)
    if is_own:
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


def _from_first_rank(checkpoint: Path | None) -> Path | None:
    """What rank 0 has found, on every rank."""
    found = [checkpoint]
    dist.broadcast_object_list(found, src=0)
    return found[0]
