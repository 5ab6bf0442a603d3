"""The benchmark of overlapped experts on a size that takes no time: its tables, its JSON, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import expert_overlap
from r1mega.pipeline.actions import Overlap, Table
from r1mega.pipeline.checker import check


def test_both_tables_run_and_differ_by_the_overlaps_alone() -> None:
    alone, beside = (Table.from_csv(expert_overlap.rows(5, overlapped)) for overlapped in (False, True))
    check(alone), check(beside)
    assert list(alone.actions(0)) == list(beside.actions(0))
    assert [sum(isinstance(cell, Overlap) for cell in table.rows[0]) for table in (alone, beside)] == [0, 4]


def test_its_figures_are_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    output = tmp_path / "overlap.json"
    small = "--latency_ms 50 --num_layers 1 --hidden_size 32 --length 8 --microbatches 4 --num_steps 1"
    monkeypatch.setattr(sys, "argv", ["expert_overlap.py", *small.split(), "--output", str(output)])
    assert expert_overlap.main() == 0
    found = json.loads(output.read_text())
    alone, beside = (found[name]["waiting_seconds"] for name in ("one by one", "overlapped"))
    # four messages of a microbatch, each on its way for 50 ms; an overlap sends those of two microbatches at once
    assert found["floor_seconds"] == pytest.approx(0.2) and alone > 0.9 * 4 * 0.2
    assert beside < alone and found["hidden"] == pytest.approx(1 - beside / alone)
    assert found["hidden_at_most"] == 0.75 and found["settings"]["microbatches"] == 4
    assert f"hidden: {found['hidden']:.0%} of the waiting" in capfd.readouterr().out


def test_a_size_without_an_overlap_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["expert_overlap.py", "--microbatches", "1"])
    with pytest.raises(SystemExit):
        expert_overlap.main()
    assert "--microbatches=1: must be 2 or more" in capsys.readouterr().err
