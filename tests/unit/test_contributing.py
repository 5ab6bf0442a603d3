"""What CONTRIBUTING.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from r1mega.config import ParallelConfig
from r1mega.pipeline.actions import Table
from r1mega.train.schedule import build_table

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_schedule_of_the_worked_example_is_checked_timed_drawn_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "CONTRIBUTING.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "bubble 20.0%" in printed and "[8, 8, 8, 8]" in printed
    assert (tmp_path / "late.png").read_bytes().startswith(b"\x89PNG")
    table = Table.from_csv((tmp_path / "late.csv").read_text())
    assert build_table(ParallelConfig(pp=4, schedule="late.csv"), 8, []).rows == table.rows
