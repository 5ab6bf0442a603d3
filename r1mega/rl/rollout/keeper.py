"""Runs a command, and kills it with all that it has started when the process that wants it closes a pipe or dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from r1mega.rl.rewards import processes

_PROGRAM = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from r1mega.rl.rollout.keeper import main
sys.exit(main(json.loads(sys.argv[2])))
"""
_LOOK = 0.1  # seconds between looks at whether the command still runs
_PATIENCE = 30.0  # seconds for the keeper to kill everything


class Keeper:
    """The keeper of one command, from the side of the process that wants it. No process outlives that one.

    Args:
        command: to run.
        log: file that gets all that it prints.
        environment: of the command.
        folder: where it runs.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> None:
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), json.dumps(list(command))],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )

    def status(self) -> int | None:
        """The exit status of the command, negative for a signal; None while it runs."""
        found = self._process.poll()
        return found if found is None or found < 128 else 128 - found

    def stop(self) -> None:
        """Kill the command and all below it; they have gone when this returns."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            processes.kill_tree(self._process.pid)
            self._process.wait()


def main(command: Sequence[str]) -> int:
    """The program of the keeper, whose standard input is the pipe.

    Returns:
        The status of the command, 128 + n where signal n has ended it.
    """
    processes.adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    wanted = True
    while wanted and child.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], _LOOK)
        wanted = not readable or bool(os.read(sys.stdin.fileno(), 1))
    status = child.returncode
    processes.kill_children()
    return 128 + signal.SIGKILL if status is None else status if status >= 0 else 128 - status
