"""Reads a schedule from a CSV file: for training, simulation and whoever runs a table of their own alike."""

from __future__ import annotations

import csv
from pathlib import Path

from r1mega.pipeline.actions import Table
from r1mega.pipeline.checker import check


def read_table(path: str | Path) -> Table:
    """The table in ``path`` (see :meth:`Table.from_csv`), proved to be able to run.

    A byte order mark, any line ends, and blank lines at the end are all right. A line that is lost is noticed where it
    leaves a gap in the numbers of the stages; without its last lines a table may well be a whole one for fewer ranks,
    so compare ``num_ranks``.

    Raises:
        ValueError: the file is no table, or one that cannot run; a ScheduleError where rank and action are known.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        table = Table.from_csv(text.rstrip())
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text; must be a CSV file") from error
    except csv.Error as error:
        raise ValueError(str(error)) from error
    check(table)
    return table
