"""Starts the program of a benchmark's ranks and reads what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r1mega.parallel_state import ParallelState

ROOT = Path(__file__).resolve().parents[1]


class RunFailed(Exception):
    """A program of the benchmark ended with an error; the message holds the end of what it wrote."""


def run_program(module: str, num_ranks: int, arguments: list[str], limit_s: int, progress: bool = False) -> Any:
    """Run ``module`` on ``num_ranks`` processes of one thread each; the JSON that its rank 0 printed last.

    Args:
        module: is run with ``python -m``, under torchrun where there are several ranks.
        num_ranks: processes.
        arguments: of the module.
        limit_s: seconds after which it is stopped.
        progress: let what it writes to stderr through, instead of keeping it for an error.

    Raises:
        RunFailed: it failed or did not end in time.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m"]
    command = [sys.executable, "-m", *(launcher if num_ranks > 1 else []), module, *arguments]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    errors = None if progress else subprocess.PIPE
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        printed, written = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"{' '.join(command)} did not end within {limit_s} seconds") from None
    finally:
        if process.poll() is None:
            process.terminate()  # which torchrun hands on to its workers; a kill would leave them behind
            process.communicate()
    if process.returncode != 0:
        raise RunFailed(f"{' '.join(command)} ended with {process.returncode}:\n{(written or '')[-3000:]}")
    return json.loads(printed.strip().splitlines()[-1])


def ran_as_rank(measure: Callable[[ParallelState], Any]) -> bool:
    """Whether this process is one of :func:`run_program`'s; if so, its part is done.

    Args:
        measure: gets a layout whose ranks are all of one expert-parallel group, over gloo, with one thread each; what
            it returns on rank 0 is printed as JSON.
    """
    if "RANK" not in os.environ:
        return False
    import torch
    import torch.distributed as dist

    from r1mega.parallel_state import Layout, ParallelState

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    num_ranks = dist.get_world_size()
    found = measure(ParallelState(Layout(num_ranks, ep=num_ranks)))
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    return True
