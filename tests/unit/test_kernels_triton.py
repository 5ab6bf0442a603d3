"""The Triton kernels, interpreted on the CPU: ``triton_cases.py`` says what they must do.

Triton decides when it is imported whether it interprets, so the cases run in a process of their own, once; here each of
their tests appears under its name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from r1mega.kernels import triton

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("triton_cases.py")
TESTS = re.findall(r"^def (test_\w+)", CASES.read_text(encoding="utf-8"), re.MULTILINE)
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "R1MEGA_NATIVE": "0", "OMP_NUM_THREADS": "1"}
needs_triton = pytest.mark.skipif(not triton._found(), reason="Triton is not installed")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The failures of each test of the cases."""
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(CASES)]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found: dict[str, list[str]] = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        failures = [*case.iter("failure"), *case.iter("error"), *case.iter("skipped")]
        found[case.attrib["name"].partition("[")[0]] += [f"{case.attrib['name']}: {each.text}" for each in failures]
    return found


@needs_triton
@pytest.mark.parametrize("name", TESTS)
def test_interpreted(name: str, outcomes: dict[str, list[str]]) -> None:
    assert name in outcomes, "it did not run"
    assert not outcomes[name], "\n\n".join(outcomes[name])


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
