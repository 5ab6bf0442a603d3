"""How the processes share the work."""

from __future__ import annotations

from dataclasses import dataclass

from r1mega.config.checks import require, require_positive

SCHEDULE_NAMES = (
    "gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2", "zbv", "v-half", "v-min", "dualpipe", "dualpipev",
    "auto",
)  # fmt: skip


@dataclass
class ParallelConfig:
    """How the processes share the work. Data parallelism takes what is left of the world.

    Args:
        tp: tensor parallel size (with sequence parallelism, always).
        pp: pipeline parallel size.
        cp: context parallel size; the model refuses more than 1 for now.
        ep: expert parallel size.
        etp: tensor parallel size inside an expert.
        schedule: pipeline schedule: gpipe, 1f1b, interleaved, looped-bfs, zb-h1, zb-h2, zbv, v-half, v-min, dualpipe,
            dualpipev, auto (a search among tables with one copy of the weights, for stages as long as their
            multiply-adds); or a table of your own, FILE.csv. With measured times of the stages let
            `r1mega simulate --schedule auto --csv FILE.csv` search, and train with that file.
        recompute: keep only the inputs of each stage in the forward, and compute it again right before the backward.
        chunks: stages that a rank holds, for interleaved and looped-bfs (null means 2) and auto (null means 1).
        memory_limit: for auto, most activations of a rank in microbatches of its share of the model, where an F adds 1
            and an input gradient and a weight gradient give back half each; null means pp, as 1f1b needs.
        placement: which block sits on which stage, for people who place layers themselves: ``E`` embedding, ``t``
            decoder layer, ``m`` MTP layer, ``L`` output head and loss, ``|`` between stages, ``t*3`` for ``ttt``;
            for example ``Et*3|t*4|t*4mL``. Null lets r1mega cut by cost.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    schedule: str = "1f1b"
    recompute: bool = False
    chunks: int | None = None
    memory_limit: float | None = None
    placement: str | None = None

    def __post_init__(self) -> None:
        known = self.schedule in SCHEDULE_NAMES or self.schedule.endswith(".csv")
        require(
            known,
            "parallel.schedule",
            self.schedule,
            f"must be one of {', '.join(SCHEDULE_NAMES)}, or a table, FILE.csv",
        )
        if self.chunks is not None:
            require_positive("parallel", self, "chunks")
            free = ("interleaved", "looped-bfs", "auto")
            what_fits = f"{self.schedule} has its own number of stages a rank; for {', '.join(free)} only"
            require(self.schedule in free, "parallel.chunks", self.chunks, what_fits)
        if self.memory_limit is not None:
            require(self.memory_limit >= 1, "parallel.memory_limit", self.memory_limit, "must be 1 or more")
            what_fits = f"is for the schedule auto, not {self.schedule}"
            require(self.schedule == "auto", "parallel.memory_limit", self.memory_limit, what_fits)
