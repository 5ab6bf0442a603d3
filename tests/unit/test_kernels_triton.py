"""The Triton kernels, interpreted on the CPU: ``triton_cases.py`` and ``tests/gpu`` say what they must do.

Triton decides when it is imported whether it interprets, so the cases run in a process of their own, once; here each of
their tests appears under its name. They run as ``tools/gpu_check.py`` runs them on a machine without pytest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from r1mega.kernels import triton
from tools.plain_tests import RESULT

ROOT = Path(__file__).parents[2]
ON_GPU = ROOT / "tests/gpu/test_triton.py"
CASES = Path(__file__).with_name("triton_cases.py")
TESTS = [
    name for path in (CASES, ON_GPU) for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
]
WARNINGS = ["-W", "error", "-W", "ignore::RuntimeWarning"]  # NumPy's, where an exponential saturates as it should
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "R1MEGA_NATIVE": "0", "OMP_NUM_THREADS": "1"}
needs_triton = pytest.mark.skipif(not triton._found(), reason="Triton is not installed")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict]:
    """What became of each test of the cases, on a machine that has not even pytest."""
    program = ["-m", "tests.unit.bare_machine", "tools.plain_tests", "--results", str(ON_GPU)]
    run = subprocess.run(
        [sys.executable, *WARNINGS, *program], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    lines = (json.loads(line.removeprefix(RESULT)) for line in run.stdout.splitlines() if line.startswith(RESULT))
    return {line["test"].rpartition("::")[2]: line for line in lines if "test" in line}


@needs_triton
@pytest.mark.parametrize("name", TESTS)
def test_interpreted(name: str, outcomes: dict[str, dict]) -> None:
    assert name in outcomes, "it did not run"
    failed = outcomes[name]["failed"]
    assert not failed, "\n\n".join(f"{each['case']}\n{each['error']}" for each in failed)
    assert outcomes[name]["passed"] > 0 and not outcomes[name]["skipped"]


@needs_triton
def test_without_pytest_the_same_cases_run_as_with_it(outcomes: dict[str, dict]) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(CASES)]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    collected = Counter(re.findall(r"::(test_\w+)", run.stdout))
    assert collected and collected == {name: outcomes[name]["passed"] for name in collected}


def test_the_package_does_not_import_triton_and_says_why_it_is_not_used() -> None:
    code = (
        "import sys, torch, r1mega.kernels.triton as t, r1mega.kernels.linear, r1mega.kernels.combine\n"
        "assert not t.available() and not t.takes(torch.ones(2)) and 'triton' not in sys.modules; print(t.reason())"
    )
    for setting, reason in (({"R1MEGA_TRITON": "0"}, "R1MEGA_TRITON=0 is set"), ({}, None)):
        if reason is None and torch.cuda.is_available():
            continue
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | setting, capture_output=True, text=True, check=True
        )
        assert run.stderr == "" and (run.stdout.strip() == reason or (reason is None and run.stdout.count("\n") == 1))


def test_other_types_and_devices_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_hindrance", lambda: None)
    monkeypatch.setattr(triton, "interpreting", lambda: True)
    x = torch.ones(2)
    assert triton.takes(x, None, x.bfloat16()) and triton.takes(torch.nn.Parameter(x))
    assert not triton.takes(x.double()) and not triton.takes(x, x.long()) and not triton.takes(x.to("meta"))
    monkeypatch.setattr(triton, "_hindrance", lambda: "it rains")
    assert not triton.takes(x) and not triton.available() and triton.reason() == "it rains"
