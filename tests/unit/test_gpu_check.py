"""``tools/gpu_check.py`` as far as it can be tested without a GPU; its parts are stand-ins that print results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_check
from tools.plain_tests import RESULT

ROOT = Path(__file__).resolve().parents[2]
PASSED = {"test": "a.py::test_a", "passed": 3, "failed": [], "skipped": [], "seconds": 0.1}
ROW = {"row": "permute", "seconds": [1.0], "met": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so_and_the_status_is_two(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, ROOT / "tools/gpu_check.py", "--output", output]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and not output.exists()
    assert run.stderr.startswith("gpu_check: torch ") and run.stderr.count("\n") == 1


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results/gpu.json"
    gpu_check.write_json(path, {"device": "first"})
    with pytest.raises(TypeError):
        gpu_check.write_json(path, {"device": object()})
    assert json.loads(path.read_text()) == {"device": "first"} and list(path.parent.iterdir()) == [path]


def printing(*results: dict, then: str = "") -> list[str]:
    """A process that prints these results, and does ``then``."""
    lines = "\n".join(RESULT + json.dumps(result) for result in results)
    return [sys.executable, "-c", f"print('progress'); print({lines!r}, flush=True); {then}"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a check whose parts are the given processes; returns its status and its file."""
    monkeypatch.setattr(gpu_check, "require_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "about", lambda: {"device": "NVIDIA Stand-in", "date": "today"})
    monkeypatch.setattr(gpu_check, "build_kernels", lambda: None)
    output = tmp_path / "gpu.json"

    def run(**parts: list[list[str]]) -> tuple[int, dict]:
        given = {"tests": [printing(PASSED)], "layer": [printing(ROW)], "routing": [printing(ROW)]}
        given |= {"waits": [printing({"layer": "plain", "waits": []})]} | parts
        monkeypatch.setattr(gpu_check, "commands", lambda part, arguments: given[part])
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--output", str(output)])
        return gpu_check.main(), json.loads(output.read_text())

    return run


def test_one_file_has_the_results_of_all_parts(run, capsys) -> None:
    status, found = run()
    assert status == 0 and found["failures"] == [] and found["complete"]
    assert found["device"] == "NVIDIA Stand-in" and found["sizes"]["tokens"] == 8192
    assert found["build"] == [{"built": True}] and found["tests"] == [PASSED] and found["layer"] == [ROW]
    shown = capsys.readouterr().out
    assert "tests: 3 passed, 0 failed, 0 skipped" in shown and "layer: 1 of 1 targets met" in shown
    assert "1/5 build" in shown and "progress" in shown and "waits: 0" in shown and RESULT not in shown


def test_what_fails_hangs_or_waits_is_told_at_the_end_and_the_rest_is_measured(run, capsys, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "build_kernels", lambda: "there is no nvcc")
    monkeypatch.setattr(gpu_check, "SECONDS", gpu_check.SECONDS | {"layer": 6.0})
    bad = PASSED | {"test": "a.py::test_b", "failed": [{"case": "test_b[1]", "error": "it is wrong"}]}
    begun = {"tests": ["a.py::test_a", "a.py::test_b", "a.py::test_c"]}
    crash = "import os; os.abort()"
    status, found = run(
        tests=[printing(begun, PASSED, bad, then="exit(1)"), printing(then=crash)],
        layer=[printing(ROW, then="import time; time.sleep(60)")],
        routing=[printing({"name": "combine", "error": "RuntimeError: no"}, ROW | {"met": False}, then="exit(1)")],
        waits=[printing({"layer": "plain", "waits": ["r1mega/moe/router.py:7"] * 2})],
    )
    assert status == 1 and found["complete"] and found["layer"] == [ROW] and len(found["routing"]) == 2
    assert found["failures"] == [
        "build: there is no nvcc",
        "tests: a.py::test_c did not end",
        "tests: test_b[1] failed",
        "tests: exit status -6",
        "layer: ended after 6 s",
        "routing: combine: RuntimeError: no",
        "waits: plain: r1mega/moe/router.py:7",
        "waits: plain: r1mega/moe/router.py:7",
    ]
    shown = capsys.readouterr().out
    assert "8 failures" in shown and "waits: 2" in shown and "missed by permute" in shown


def test_a_run_that_is_cut_off_leaves_what_it_had_measured(run, monkeypatch) -> None:
    class CutOff(BaseException):
        pass

    original = gpu_check.run_part

    def cut(part, *given):
        if part == "routing":
            raise CutOff
        original(part, *given)

    monkeypatch.setattr(gpu_check, "run_part", cut)
    with pytest.raises(CutOff):
        run()
    found = json.loads(Path(sys.argv[-1]).read_text())
    assert found["layer"] == [ROW] and not found["complete"] and "routing" not in found


def test_tests_are_shared_by_processes_and_none_is_left_out() -> None:
    shares = [command[-1] for command in gpu_check.commands("tests", None)]
    assert shares == [f"--share={index}/{len(shares)}" for index in range(len(shares))]
    assert set(gpu_check.TEST_FILES) == {str(p.relative_to(ROOT)) for p in (ROOT / "tests/gpu").glob("test_*.py")}


@pytest.mark.parametrize("module", ["tools.gpu_check", "benchmarks.gpu_rows"])
def test_a_machine_with_nothing_but_torch_is_enough(module: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.bare_machine", module, "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_without_pytest_both_files_of_tests_can_be_read() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.unit.bare_machine", "tools.plain_tests", "--share=98/99"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([*command, *gpu_check.TEST_FILES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "", run.stdout + run.stderr


CASES = """
import pytest

STATE = []

@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize("b, c", [(3, 4), (5, 6)])
def test_product(a, b, c):
    STATE.append((a, b, c))

def test_order(monkeypatch):
    assert STATE == [(1, 3, 4), (2, 3, 4), (1, 5, 6), (2, 5, 6)]
    monkeypatch.setattr(pytest, "__name__", "changed")

def test_undone():
    assert pytest.__name__ == "pytest"
    pytest.skip("not here")

def test_bad():
    assert 1 == 2

def test_wants(tmp_path):
    pass
"""


def test_the_plain_runner_does_what_pytest_does_and_fails_what_it_cannot(tmp_path: Path) -> None:
    path = tmp_path / "test_cases.py"
    path.write_text(CASES)
    command = [sys.executable, "-m", "tools.plain_tests", "--results", str(path), str(tmp_path / "test_none.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    results = [json.loads(line.removeprefix(RESULT)) for line in run.stdout.splitlines() if line.startswith(RESULT)]
    found = {result["test"].rpartition("::")[2]: result for result in results[1:]}
    assert run.returncode == 1 and results[0]["tests"] == [result["test"] for result in results[1:]]
    counts = {name: (one["passed"], len(one["failed"]), len(one["skipped"])) for name, one in found.items()}
    assert counts == {
        "test_none.py": (0, 1, 0), "test_product": (4, 0, 0), "test_order": (1, 0, 0), "test_undone": (0, 0, 1),
        "test_bad": (0, 1, 0), "test_wants": (0, 1, 0),
    }  # fmt: skip
    assert "there is no fixture tmp_path here" in found["test_wants"]["failed"][0]["error"]
