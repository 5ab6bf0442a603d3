"""Programs that a model wrote: run in a sandbox or not at all."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from r1mega.config import ConfigError
from r1mega.rl.rewards import RewardFailure, RewardOptions, RewardPool, Sample, check_rewards
from r1mega.rl.rewards.processes import descendants
from r1mega.rl.rewards.programs import code
from r1mega.rl.rewards.sandbox import check_sandbox, run_program

TESTS = "assert double(3) == 6\nassert double('a') == 'aa'\n"


def _no_sandbox() -> str | None:
    try:
        check_sandbox()
    except ConfigError as error:
        return str(error)
    return None


needs_sandbox = pytest.mark.skipif(_no_sandbox() is not None, reason=str(_no_sandbox()))


def sample(program: str, **data: object) -> Sample:
    return Sample("", f"<think>easy</think> <answer>```python\n{program}\n```</answer>", None, data or {"tests": TESTS})


def test_code_is_refused_in_one_line_where_bubblewrap_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("setpriv", "prlimit"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        check_rewards(RewardOptions(names=["format", "code"]))
    assert "needs bwrap" in str(caught.value) and "bubblewrap" in str(caught.value) and "\n" not in str(caught.value)


def test_code_is_refused_in_one_line_where_bubblewrap_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="^rewards.names=code: bubblewrap cannot make a sandbox on this machine"):
        check_rewards(RewardOptions(names=["code"]))


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("def double(x): return x * 2", 1.0),
        ("def double(x): return x + 3", 0.0),
        ("def double(x: return", 0.0),
        ("print('a lot ' * 1000)\ndef double(x): return x + x", 1.0),
        ("import sys; sys.exit(0)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("import sys; print(sys.stdin.read()); sys.exit(0)", 0.0),
        ("import atexit, os; atexit.register(os._exit, 0); double = None", 0.0),
    ],
)
def test_a_program_is_right_if_the_tests_after_it_all_ran(program: str, value: float) -> None:
    assert code(sample(program)) == value


@needs_sandbox
def test_a_program_is_right_if_it_writes_the_output_of_every_case() -> None:
    cases = [{"input": "3\n", "output": "6\n"}, {"input": "-1", "output": "-2"}]
    assert code(sample("print(int(input()) * 2, ' ')", cases=cases)) == 1.0
    assert code(sample("print(int(input()) + 3)", cases=cases)) == 0.0
    assert code(sample("print(6)", cases=cases)) == 0.0


@needs_sandbox
def test_what_stands_before_the_program_can_be_used_by_it() -> None:
    tests = "assert f([2]) == 4"
    assert code(sample("def f(x: List): return twice(x[0])", tests=tests)) == 0.0
    prelude = "from typing import List\ndef twice(x): return 2 * x\n"
    assert code(sample("def f(x: List): return twice(x[0])", tests=tests, prelude=prelude)) == 1.0


@needs_sandbox
def test_a_program_sees_nothing_and_can_write_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "72")
    (tmp_path / "secret").write_text("72")
    program = f"""
import os, socket
def attempt(action):
    try:
        return action()
    except OSError:
        return None
places = ["/new", "/tmp/new", "/dev/new", "/dev/shm/new", "/usr/new", "/program.py", {str(tmp_path / "new")!r}]
print([attempt(lambda: open(place, "w")) for place in places] == [None] * len(places))
print(attempt(lambda: open({str(tmp_path / "secret")!r}).read()), attempt(lambda: os.listdir("/proc")))
print(os.environ.get("SECRET"), os.getuid() != 0, os.path.exists("/etc/passwd"))
print(attempt(lambda: socket.create_connection(("127.0.0.1", 80), timeout=1)))
print(sorted(name for name in os.listdir("/home") if os.path.exists("/home")) if os.path.exists("/home") else [])
"""
    result = run_program(program, "")
    assert result.status == 0
    assert result.output.decode().splitlines() == ["True", "None None", "None True False", "None", "[]"]


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True: pass", "program took too long"),
        ("import time; time.sleep(60)", "program took too long"),
        ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "program took too long"),
        ("import ctypes; ctypes.string_at(0)", "program was killed: SIGSEGV"),
    ],
)
def test_a_program_that_is_stopped_is_a_counted_failure(program: str, reason: str) -> None:
    with pytest.raises(RewardFailure, match=reason):
        code(sample(program), program_time_limit=1.0 if "long" in reason else 10.0)


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(1 << 30)",
        "while True: print('x' * 1000)",
        "import os\nfor _ in range(1000):\n    if os.fork() == 0:\n        import time; time.sleep(60)",
    ],
)
def test_memory_output_and_processes_are_limited(program: str) -> None:
    start = time.monotonic()
    result = run_program(program, "", time_limit=20.0)
    assert result.status != 0 and len(result.output) <= 1 << 20
    assert time.monotonic() - start < 20


@needs_sandbox
def test_the_limits_are_those_of_the_arguments() -> None:
    program = """
import resource
for name in ("AS", "CPU", "FSIZE", "NPROC", "CORE"):
    print(name, *resource.getrlimit(getattr(resource, f"RLIMIT_{name}")))
"""
    output = run_program(program, "", time_limit=20.0, memory_limit=100).output.decode()
    assert output.splitlines() == [
        f"AS {100 << 20} {100 << 20}",
        "CPU 21 21",
        f"FSIZE {1 << 20} {1 << 20}",
        "NPROC 32 32",
        "CORE 0 0",
    ]


@needs_sandbox
def test_code_in_the_pool_leaves_no_process(capfd: pytest.CaptureFixture[str]) -> None:
    options = RewardOptions(
        names=["code", "format"], weights=[2.0, 1.0], arguments={"code": {"program_time_limit": 3.0}}
    )
    programs = ["def double(x): return x * 2", "while True: pass", "def double(x): print(x); return 0", "x = ("]
    before, seen = set(descendants(os.getpid())), set()  # other tests have workers
    with RewardPool(options, 2) as pool:
        futures = [pool.submit(sample(program)) for program in programs]
        while not all(future.done() for future in futures):
            seen |= set(descendants(os.getpid())) - before
            time.sleep(0.02)
        assert [future.result(60).total for future in futures] == [3.0, 1.0, 1.0, 1.0]
        assert pool.failures() == {"code": {"program took too long": 1}}
        cases = [{"input": "3", "output": "6"}]
        assert pool.submit(sample("print(int(input()) * 2)", cases=cases)).result(60).by_name["code"] == 1.0
    # Two processes a worker, and for a program bubblewrap's two and its own.
    assert len(seen) >= 7
    assert not [process for process in seen if Path(f"/proc/{process}").exists()]
    assert capfd.readouterr() == ("", "")
