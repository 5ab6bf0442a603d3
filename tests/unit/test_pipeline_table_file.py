"""A file with a schedule: `r1mega simulate --table` and `--parallel.schedule` read and refuse the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from r1mega import cli
from r1mega.config import ConfigError, ParallelConfig
from r1mega.pipeline.schedules import SCHEDULES, make_table
from r1mega.train.schedule import build_table

GOOD = make_table("1f1b", 2, 3).to_csv()


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "mine.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def train_with(path: Path, num_ranks: int = 2, num_microbatches: int = 3) -> list:
    return build_table(ParallelConfig(pp=num_ranks, schedule=str(path)), num_microbatches, []).rows


def refusals(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """By training and by the simulation, without the names of the settings."""
    with pytest.raises(ConfigError) as caught:
        train_with(path)
    assert cli.main(["simulate", "--table", str(path)]) == 2
    printed = capsys.readouterr().err.removeprefix(f"r1mega: error: table={path}: ").rstrip("\n")
    return str(caught.value).removeprefix(f"parallel.schedule={path}: "), printed


WRITTEN: dict[str, Callable[[str], bytes]] = {
    "as to_csv writes": str.encode,
    "with a byte order mark": lambda text: text.encode("utf-8-sig"),
    "with blank lines at the end": lambda text: f"{text}\n \n\n".encode(),
    "with other line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "without the last line end": lambda text: text.rstrip().encode(),
    "from a spreadsheet": lambda text: text.replace("\n", ",,\r\n").encode("utf-8-sig"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_file_is_read_alike_however_it_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    path = write(tmp_path, WRITTEN[how](GOOD))
    assert train_with(path) == make_table("1f1b", 2, 3).rows
    assert cli.main(["simulate", "--table", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"] == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text; must be a CSV file"),
        ("", "rank 0: there is no microbatch"),
        ("0F0,0B0,0R\n\n1F0,1B0,1R\n", "rank 1: holds no stage"),
        ("0F0,0F5,0B0,0R\n", "rank 0: there is a microbatch 5, but there are 4 actions only"),
    ],
)
def test_both_refuse_the_same_for_the_same_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, reason: str
) -> None:
    assert refusals(write(tmp_path, content), capsys) == (reason, reason)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_line_that_is_lost_is_noticed_where_it_leaves_a_gap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    lines = make_table(name, 4, 4).to_csv().splitlines(keepends=True)
    for lost in range(4):
        path = write(tmp_path, "".join(lines[:lost] + lines[lost + 1 :]))
        if lost < 3 or SCHEDULES[name].chunks != 1:
            assert all("no rank runs stage" in each and "is a line missing?" in each for each in refusals(path, capsys))
        else:  # without its last stage it is a whole table for fewer ranks
            message = "the table is for 3 ranks, parallel.pp makes 4; is a line missing\\?"
            with pytest.raises(ConfigError, match=message):
                train_with(path, 4, 4)
            assert cli.main(["simulate", "--table", str(path), "--ranks", "4"]) == 2
            assert "ranks=4: " in capsys.readouterr().err
