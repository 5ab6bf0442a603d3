"""What the example scripts share: one file that bash, torchrun and Python all run. Imports no torch."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from r1mega.config import ParallelConfig

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
    """Replace this process by torchrun, which runs ``file`` once a process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*torchrun, file, *arguments])
