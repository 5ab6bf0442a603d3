"""The benchmark of the GRPO head at sizes that take no time: its table, JSON, and what makes it fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import grpo_head

TINY = ["--tokens", "64", "--hidden", "8", "--vocab", "40", "--rounds", "1", "--chunk", "8", "--temperature", "0.9"]
OURS = {"naive", "naive, no entropy", "r1mega", "r1mega, PyTorch only", "r1mega, RL batch"}


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line; the peers, whose import takes seconds, are as if they were not installed."""
    command = ["grpo_head.py", *TINY]
    monkeypatch.setattr(sys, "argv", command)
    for module in ("trl.kernels.chunked_logprob", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, module, None)
    return command


def test_every_path_is_compared_counted_and_timed(arguments, tmp_path: Path, capsys) -> None:
    output = tmp_path / "head.json"
    arguments += ["--output", str(output)]
    assert grpo_head.main() == 0
    found = json.loads(output.read_text())["layouts"]["tp1"]
    assert found["paths"].keys() == OURS and found["missing"].keys() == {"TRL", "Liger"}
    for name, line in found["paths"].items():
        assert len(line["seconds"]) == 1 and line["extra_bytes"] > 0 and line["largest_difference"] < 1e-5
        # 48 of 64 tokens are of completions, and half of them have a gradient
        assert line["products"] == (pytest.approx((48 + 2 * 24) / 64) if name == "r1mega, RL batch" else 3)
    assert found["paths"]["naive"]["extra_bytes"] >= 3 * 4 * 64 * 40
    printed = capsys.readouterr().out
    assert "results agree" in printed and all(f"\n{name} " in printed for name in OURS)


def test_a_path_with_other_results_fails(arguments, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = grpo_head.r1mega
    monkeypatch.setattr(grpo_head, "r1mega", lambda p: 1.01 * right(p))
    assert grpo_head.main() == 1
    assert "tp1, r1mega: differs from naive by 1.0e-02" in capsys.readouterr().out


def test_a_missed_aim_is_said_and_fails_at_full_size_only(arguments, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(grpo_head, "MOST_MEMORY", 1e-9)
    assert grpo_head.main() == 0
    monkeypatch.setattr(grpo_head, "SIZES", {"cpu": (64, 8, 40)})
    assert grpo_head.main() == 1
    assert "tp1: memory" in capsys.readouterr().out
