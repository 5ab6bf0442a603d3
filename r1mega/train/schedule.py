"""Which schedule table the settings ask for, and whether the model fits it. Pure: no torch, no process."""

from __future__ import annotations

from pathlib import Path

from r1mega.config import Config, ConfigError, ParallelConfig
from r1mega.model.blocks import place_blocks
from r1mega.parallel_state import Layout
from r1mega.pipeline.actions import Kind, Table
from r1mega.pipeline.checker import check
from r1mega.pipeline.schedules import make_table, with_recomputation


def build_table(parallel: ParallelConfig, num_microbatches: int) -> Table:
    """The checked table that ``parallel.schedule`` names: a schedule's name, or a file in the notation of ``2F0``.

    Raises:
        ConfigError: there is no such schedule or file, or it cannot run with these ranks and so many microbatches.
    """
    try:
        if parallel.schedule.endswith(".csv"):
            table = _read(Path(parallel.schedule), parallel.pp, num_microbatches)
        else:
            table = make_table(parallel.schedule, parallel.pp, num_microbatches, parallel.chunks)
    except (ValueError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"parallel.schedule={parallel.schedule}: {reason}") from error
    return with_recomputation(table) if parallel.recompute else table


def _read(path: Path, num_ranks: int, num_microbatches: int) -> Table:
    table = Table.from_csv(path.read_text(encoding="utf-8"))
    check(table)
    early = next((a for rank in range(table.num_ranks) for a in table.actions(rank) if a.kind is Kind.O), None)
    if early is not None:
        raise ValueError(f"{early} steps the optimizer, which training does once the norm of all gradients is known")
    if table.num_ranks != num_ranks:
        raise ValueError(f"the table is for {table.num_ranks} ranks, parallel.pp makes {num_ranks}")
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
    table = build_table(parallel, num_microbatches(config, Layout.from_config(parallel, world_size).dp))
    try:
        place_blocks(config.model, parallel, config.data.sequence_length, table.stages_per_copy)
    except ConfigError as error:
        if parallel.placement is not None:
            raise
        raise ConfigError(f"parallel.pp={parallel.pp}, parallel.schedule={parallel.schedule}: {error}") from error
