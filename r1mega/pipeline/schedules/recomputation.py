"""Activation checkpointing as a change of a table: any schedule, with its forwards computed again."""

from __future__ import annotations

from r1mega.pipeline.actions import Action, Kind, Overlap, Table
from r1mega.pipeline.schedules.common import Row


def with_recomputation(table: Table) -> Table:
    """Copy ``table`` with a C right before each B or I (before the whole cell, where it is overlapped) that has none.

    A stage then keeps the inputs of a microbatch only, from its F to its C.
    """
    return Table(list(table.stage_to_rank), [_with_recomputation(row) for row in table.rows], table.num_copies)


def _with_recomputation(row: Row) -> Row:
    recomputed = {cell for cell in row if isinstance(cell, Action) and cell.kind is Kind.C}
    changed: Row = []
    for cell in row:
        backward = cell.backward if isinstance(cell, Overlap) else cell
        again = backward._replace(kind=Kind.C)
        if backward.kind in (Kind.B, Kind.I) and again not in recomputed:
            changed.append(again)
        changed.append(cell)
    return changed
