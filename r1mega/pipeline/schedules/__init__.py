"""Generators of schedule tables. Each one is a function of (ranks, microbatches) and knows nothing of tensors.

Every generator runs the backwards of a stage in the order of the microbatches, so that gradients are added up in the
same order whatever the schedule, and reduces the gradients of a stage (R) right after its last action.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass

from r1mega.pipeline.actions import Table
from r1mega.pipeline.schedules.blocks import v_half, v_min, zbv
from r1mega.pipeline.schedules.common import with_reductions
from r1mega.pipeline.schedules.dualpipe import dualpipe, dualpipev
from r1mega.pipeline.schedules.looped import interleaved, looped_bfs
from r1mega.pipeline.schedules.one_stage import gpipe, one_f_one_b
from r1mega.pipeline.schedules.recomputation import with_recomputation
from r1mega.pipeline.schedules.zero_bubble import zb_h1, zb_h2

__all__ = [
    "SCHEDULES", "Schedule", "dualpipe", "dualpipev", "gpipe", "interleaved", "looped_bfs", "make_table",
    "one_f_one_b", "require_known", "v_half", "v_min", "with_recomputation", "with_reductions", "zb_h1", "zb_h2", "zbv",
]  # fmt: skip

DEFAULT_CHUNKS = 2


@dataclass(frozen=True)
class Schedule:
    """A schedule that goes by a name.

    Args:
        make: ``make(num_ranks, num_microbatches)``, and a third argument ``chunks`` where the user chooses it.
        chunks: stages that a rank holds; None where the user chooses it (2 by default).
        summary: one line that says what it is.
    """

    make: Callable[..., Table]
    chunks: int | None
    summary: str


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule(gpipe, 1, "all forwards, then all backwards"),
    "1f1b": Schedule(one_f_one_b, 1, "one forward, one backward"),
    "interleaved": Schedule(interleaved, None, "1F1B over several stages a rank: smaller bubble, more messages"),
    "looped-bfs": Schedule(looped_bfs, None, "several stages a rank, one after the other: gradients reduced early"),
    "zb-h1": Schedule(zb_h1, 1, "1F1B with late weight gradients: a third of its bubble in the same memory"),
    "zb-h2": Schedule(zb_h2, 1, "ZB-H1 with twice the memory: no bubble where F, I and W take the same time"),
    "zbv": Schedule(zbv, 2, "two stages a rank in a V: no bubble where F, I and W take the same time, memory of 1F1B"),
    "v-half": Schedule(v_half, 2, "ZBV with half the memory of 1F1B and half its bubble"),
    "v-min": Schedule(v_min, 2, "ZBV with a third of the memory of 1F1B and two thirds of its bubble"),
    "dualpipe": Schedule(dualpipe, 2, "two copies of the weights, from both ends; forwards overlap backwards"),
    "dualpipev": Schedule(dualpipev, 2, "DualPipe in a V with one copy of the weights"),
}


def require_known(name: str, names: Collection[str]) -> None:
    """Raise ValueError with the nearest of ``names``, and all of them, unless ``name`` is one."""
    if name not in names:
        nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.3)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"there is no schedule {name!r}; {hint}There are {', '.join(names)}")


def make_table(name: str, num_ranks: int, num_microbatches: int, chunks: int | None = None) -> Table:
    """The table of the schedule called ``name``.

    Args:
        name: a key of :data:`SCHEDULES`.
        num_ranks: ranks of the pipeline.
        num_microbatches: microbatches of a step.
        chunks: stages that a rank holds; None takes the schedule's own number.

    Raises:
        ValueError: there is no such schedule, or it cannot run with these numbers; says what would fit.
    """
    require_known(name, SCHEDULES)
    schedule = SCHEDULES[name]
    if schedule.chunks is None:
        return schedule.make(num_ranks, num_microbatches, DEFAULT_CHUNKS if chunks is None else chunks)
    if chunks not in (None, schedule.chunks):
        free = " and ".join(other for other, each in SCHEDULES.items() if each.chunks is None)
        held = "1 stage" if schedule.chunks == 1 else f"{schedule.chunks} stages"
        raise ValueError(f"a rank of {name} holds {held}, not {chunks}; {free} take any number of chunks")
    return schedule.make(num_ranks, num_microbatches)
