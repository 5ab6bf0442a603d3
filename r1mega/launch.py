"""What the example scripts share: one file that bash, torchrun and Python all run. Imports no torch before it must.

:func:`main` is torchrun, except that a job which fails or is stopped ends with one line and no traceback.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from r1mega.config import ParallelConfig
from r1mega.stopping import LAUNCHED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

ROOT = str(Path(__file__).parent.parent)
GIVES_LAYOUT = re.compile(r"--(config|parallel\.(tp|pp|cp|ep|etp))(=|$)")


def with_usual_layout(arguments: Sequence[str], layout: Sequence[str]) -> list[str]:
    """``arguments``, after those of ``layout`` where they say nothing about one and NPROC is not set."""
    given = any(GIVES_LAYOUT.match(argument) for argument in arguments) or "NPROC" in os.environ
    return list(arguments) if given else [*layout, *arguments]


def number_of_processes(parallel: ParallelConfig, usual: int) -> int:
    """NPROC if it is set, else ``usual`` where the layout divides it, else the fewest that the layout needs."""
    if os.environ.get("NPROC", "").isdecimal():
        return int(os.environ["NPROC"])
    stage = math.lcm(max(1, parallel.tp * parallel.cp), max(1, parallel.ep * parallel.etp))
    needed = stage * max(1, parallel.pp)
    return usual if usual % needed == 0 else needed


def become_torchrun(file: str, arguments: Sequence[str], processes: int) -> NoReturn:
    """Replace this process by a launcher, which runs ``file`` once a process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # r1mega need not be installed, and PYTHONPATH would reach every process that the job starts.
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from r1mega.launch import main; sys.exit(main(sys.argv[1:]))"
    launcher = [sys.executable, "-c", code, "--standalone", f"--nproc-per-node={processes}"]
    print(f"r1mega: starting {processes} process{'es' * (processes > 1)}", flush=True)
    os.execv(sys.executable, [*launcher, file, *arguments])


def main(argv: Sequence[str]) -> int:
    """Run torchrun with ``argv``; returns the exit status of the job."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)  # until torchrun has handlers of its own
    os.environ[LAUNCHED] = "1"
    try:
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run
    except _Stopped as stopped:
        return _stopped(stopped.number)
    logging.disable(logging.ERROR)  # what it says about processes that it ends is said below
    try:
        run(parse_args(list(argv)))
    except ChildFailedError as error:
        return _failed(error)
    except SignalException as error:
        return _stopped(error.sigval)
    except _Stopped as stopped:
        return _stopped(stopped.number)
    return 0


class _Stopped(BaseException):
    """A signal has come before torchrun was ready for it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped(number)


def _stopped(number: int) -> int:
    print("\nr1mega: stopped", file=sys.stderr, flush=True)
    return 128 + number


def _failed(error: ChildFailedError) -> int:
    """Name the rank that ended first, unless a rank has said why it ended: then its error file is not empty."""
    rank, failure = error.get_first_failure()
    if not any(isinstance(other.message, dict) for other in error.failures.values()):
        how = f"exit status {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
        line = f"rank {rank} (process {failure.pid}) died ({how}), so the others were stopped"
        print(f"r1mega: error: {line}", file=sys.stderr, flush=True)
    return failure.exitcode if failure.exitcode > 0 else 1
