"""The benchmark of overlapped experts: its tables, and what it refuses."""

from __future__ import annotations

import sys

import pytest

from benchmarks import expert_overlap
from r1mega.pipeline.actions import Overlap, Table
from r1mega.pipeline.checker import check


def test_both_tables_run_and_differ_by_the_overlaps_alone() -> None:
    alone, beside = (Table.from_csv(expert_overlap.rows(5, overlapped)) for overlapped in (False, True))
    check(alone), check(beside)
    assert list(alone.actions(0)) == list(beside.actions(0))
    assert [sum(isinstance(cell, Overlap) for cell in table.rows[0]) for table in (alone, beside)] == [0, 4]


def test_a_size_without_an_overlap_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["expert_overlap.py", "--microbatches", "1"])
    with pytest.raises(SystemExit):
        expert_overlap.main()
    assert "--microbatches=1: must be 2 or more" in capsys.readouterr().err
