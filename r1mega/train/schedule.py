"""Which schedule table the settings ask for, and whether the model fits it. Pure: no torch, no process."""

from __future__ import annotations

from pathlib import Path

from r1mega.config import Config, ConfigError, ParallelConfig
from r1mega.model.blocks import cut, list_blocks
from r1mega.parallel_state import Layout
from r1mega.pipeline.actions import Kind, Table
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.partition import Block
from r1mega.pipeline.schedules import make_table, with_recomputation
from r1mega.pipeline.table_file import read_table

SEARCH_EFFORT = 0.2


def build_table(parallel: ParallelConfig, num_microbatches: int, blocks: list[Block]) -> Table:
    """The checked table that ``parallel.schedule`` names: a schedule's name, or a file in the notation of ``2F0``.

    Args:
        parallel: the schedule and its ranks.
        num_microbatches: of a step, on each data-parallel rank.
        blocks: of the model; ``auto`` searches with their costs.

    Raises:
        ConfigError: there is no such schedule or file, or it cannot run with these ranks and so many microbatches.
    """
    try:
        if parallel.schedule.endswith(".csv"):
            table = _read(Path(parallel.schedule), parallel.pp, num_microbatches)
        elif parallel.schedule == "auto":
            table = _search(parallel, num_microbatches, blocks)
        else:
            table = make_table(parallel.schedule, parallel.pp, num_microbatches, parallel.chunks)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"parallel.schedule={parallel.schedule}: {reason}") from error
    return with_recomputation(table) if parallel.recompute else table


def _search(parallel: ParallelConfig, num_microbatches: int, blocks: list[Block]) -> Table:
    """The best table within ``memory_limit``, or the memory of 1F1B, for stages as long as their multiply-adds.

    Forward, input gradient and weight gradient of a product are as many multiply-adds each. The search is the same on
    every rank, and takes a second.
    """
    from r1mega.pipeline.auto import best_table

    chunks = parallel.chunks or 1
    stages = cut(blocks, parallel, parallel.pp * chunks)
    times = [sum(block.cost for block in stage) / sum(block.cost for block in blocks) for stage in stages]
    limit = parallel.pp if parallel.memory_limit is None else parallel.memory_limit
    costs = Costs(times, times, times)
    return best_table(parallel.pp, num_microbatches, costs, limit, chunks=chunks, effort=SEARCH_EFFORT).table


def _read(path: Path, num_ranks: int, num_microbatches: int) -> Table:
    table = read_table(path)
    early = next((a for rank in range(table.num_ranks) for a in table.actions(rank) if a.kind is Kind.O), None)
    if early is not None:
        raise ValueError(f"{early} steps the optimizer, which training does once the norm of all gradients is known")
    if table.num_ranks != num_ranks:
        hint = "; is a line missing?" if table.num_ranks < num_ranks else ""
        raise ValueError(f"the table is for {table.num_ranks} ranks, parallel.pp makes {num_ranks}{hint}")
    if table.num_microbatches != num_microbatches:
        raise ValueError(
            f"the table is for {table.num_microbatches} microbatches, train.global_batch_size and microbatch_size make "
            f"{num_microbatches}"
        )
    return table


def num_microbatches(config: Config, dp: int) -> int:
    """Microbatches of a step on each data-parallel rank."""
    return config.train.global_batch_size // (dp * config.train.microbatch_size)


def check_pipeline(config: Config, world_size: int) -> None:
    """Check that the schedule can run and that the model can be cut into its stages. Raises ConfigError."""
    parallel = config.parallel
    blocks = list_blocks(config.model, config.data.sequence_length)
    table = build_table(parallel, num_microbatches(config, Layout.from_config(parallel, world_size).dp), blocks)
    try:
        cut(blocks, parallel, table.stages_per_copy)
    except ConfigError as error:
        if parallel.placement is not None:
            raise
        # The cut knows stages only; the user has given ranks and a schedule.
        number, what_fits = str(error).removeprefix("pipeline stages=").split(": ", 1)
        stages = f"makes {number} pipeline stages with parallel.schedule={parallel.schedule}, {what_fits}"
        raise ConfigError(f"parallel.pp={parallel.pp}: {stages}") from error
