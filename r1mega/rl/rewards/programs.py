"""Accuracy for code: does the program pass the tests?"""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable
from typing import Any

from r1mega.config import require
from r1mega.rl.rewards.answers import extract_program
from r1mega.rl.rewards.definition import RewardFailure, reward
from r1mega.rl.rewards.sample import Sample
from r1mega.rl.rewards.sandbox import Result, check_sandbox, run_program

_SIGNALS = 128  # a shell's way of saying that a signal ended a program, which bubblewrap shares


def check(program_time_limit: float = 4.0, program_memory_limit: int = 512) -> None:
    """Check the arguments and that there is a sandbox. Raises :class:`~r1mega.config.ConfigError`."""
    prefix = "rewards.arguments.code"
    require(program_time_limit > 0, f"{prefix}.program_time_limit", program_time_limit, "must be positive")
    require(program_memory_limit >= 64, f"{prefix}.program_memory_limit", program_memory_limit, "must be 64 or more")
    check_sandbox()


# Files: the program is handed over in one that exists in memory only.
@reward(allow=["files", "processes"], check=check, needs=["tests|cases"])
def code(sample: Sample, program_time_limit: float = 4.0, program_memory_limit: int = 512) -> float:
    """1 if the completion's program passes all tests, 0 if not. Runs in the sandbox, see ``sandbox.py``.

    The program is the last fenced block of the answer. A program that takes too long, or is killed for what it uses, is
    a failure and counted as one; one that raises or is wrong has 0.

    Args:
        sample: needs one of: ``data["tests"]``, Python source that is run after the program in the same module and
            raises where it is wrong (``data["prelude"]``, if there, comes before the program);
            ``data["cases"]``, a list of ``{"input": text, "output": text}``: the program is run on each input and must
            write the output (white space at line ends and at the end does not count).
        program_time_limit: seconds for all tests or cases together; less than ``rewards.time_limit``.
        program_memory_limit: MiB.

    ``tests`` share the interpreter with the program: one that merely exits early fails, but one that sets out to
    deceive (by objects that are equal to everything) can. ``cases`` are compared outside, and cannot be deceived.
    """
    program = extract_program(sample.completion)
    deadline = time.monotonic() + program_time_limit

    def run(source: str, stdin: str | None = None) -> Result:
        left = max(deadline - time.monotonic(), 0.0)
        result = run_program(source, stdin, time_limit=left, memory_limit=program_memory_limit)
        _raise_if_killed(result.status)
        return result

    if "cases" in sample.data:
        return float(all(_passes(run, program, case) for case in sample.data["cases"]))
    return float(_passes_tests(run, program, sample.data))


def _passes_tests(run: Callable[[str], Result], program: str, data: dict[str, Any]) -> bool:
    # Said after the last test. The program cannot say it: it reads nothing that has it, and it is new each time.
    word = secrets.token_hex(16)
    end = f'import os\nos.write(1, b"{word}")\nos._exit(0)\n'
    source = "\n".join([data.get("prelude", ""), program, data["tests"], end])
    result = run(source)
    return result.status == 0 and result.output.endswith(word.encode())


def _passes(run: Callable[[str, str], Result], program: str, case: dict[str, str]) -> bool:
    result = run(program, case["input"])
    return result.status == 0 and _lines(result.output.decode(errors="replace")) == _lines(case["output"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _raise_if_killed(status: int) -> None:
    number = -status if status < 0 else status - _SIGNALS
    if number in set(signal.Signals):
        raise RewardFailure(f"program was killed: {signal.Signals(number).name}")
