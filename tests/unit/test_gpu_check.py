"""``tools/gpu_check.py`` as far as it can be tested without a GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu_check

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"tokens": 8192, "hidden": 7168, "experts": 256, "top_k": 8}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so_and_the_status_is_two(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, ROOT / "tools/gpu_check.py", "--output", output]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and not output.exists()
    assert run.stderr.startswith("gpu_check: torch ") and run.stderr.count("\n") == 1


def test_floors_are_the_bytes_of_inputs_and_results() -> None:
    floors = gpu_check.floors(**SIZES)
    assert floors["route"] == 8192 * 256 * 4 + 8192 * 8 * 8 == floors["route backward"]
    assert floors["permute"] == 9 * 8192 * 7168 * 2 + 8192 * 8 * 4
    assert floors["combine"] == 9 * 8192 * 7168 * 2 + 8192 * 8 * 8
    assert floors["scan"] == 128 * 256 * 12 + 256 * 8


def test_inputs_together_are_larger_than_the_cache() -> None:
    for cache, one in ((60 << 20, 8 << 20), (1, 5), (50 << 20, 10**9)):
        number = gpu_check.sets(cache, one)
        assert number * one >= 4 * cache > (number - 1) * one


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results/gpu.json"
    gpu_check.write_json(path, {"device": "first"})
    with pytest.raises(TypeError):
        gpu_check.write_json(path, {"device": object()})
    assert json.loads(path.read_text()) == {"device": "first"} and list(path.parent.iterdir()) == [path]


def test_the_plain_runner_runs_each_test_and_names_those_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "tests/gpu").mkdir(parents=True)
    good = tmp_path / "tests/gpu/test_good.py"
    good.write_text("def test_one():\n    pass\n\ndef test_two():\n    pass\n\ndef test_with(fixture):\n    assert 0\n")
    (tmp_path / "tests/gpu/test_needs.py").write_text("import no_such_module\n")
    left_out = "test_with (takes arguments), test_needs.py (needs no_such_module)"
    assert gpu_check.run_tests_plainly() == f"without pytest, 2 passed; left out: {left_out}"
    good.write_text(good.read_text() + "\ndef test_bad():\n    assert 1 == 2\n")
    with pytest.raises(gpu_check.Failed, match="test_bad"):
        gpu_check.run_tests_plainly()
    assert "2 passed" in capsys.readouterr().out


def test_nothing_is_written_where_a_test_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise gpu_check.Failed("a test failed")

    monkeypatch.setattr(gpu_check, "require_gpu", lambda: None)
    monkeypatch.setattr(gpu_check, "run_tests", fail)
    monkeypatch.setattr("r1mega.kernels.cuda.library", object())
    output = tmp_path / "gpu.json"
    given = argparse.Namespace(**SIZES, no_build=True, no_tests=False, groups=8, kept_groups=4, output=output)
    monkeypatch.setattr(gpu_check, "parse_arguments", lambda: given)
    assert gpu_check.main() == 1 and not output.exists()
