"""From a schedule table to a running pipeline: this rank's stages and their executor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from r1mega.config import Config
from r1mega.model.blocks import place_blocks
from r1mega.model.stage import build_stage
from r1mega.parallel_state import ParallelState
from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.train.sharding import reduce_gradients, shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def build_stages(config: Config, state: ParallelState, table: Table) -> dict[int, nn.Module]:
    """This rank's stages by number in ``table``: cut, sharded, allocated, not yet initialised."""
    dtype = DTYPES[config.train.dtype]
    placed = place_blocks(config.model, config.parallel, config.data.sequence_length, table.stages_per_copy)
    # With bfloat16 the parameters are float32 master weights, and are cast when FSDP gathers them.
    stored = torch.float32 if dtype == torch.bfloat16 else dtype
    stages: dict[int, nn.Module] = {}
    for number in table.stages_of(state.rank_in("pp")):
        stage = build_stage(config.model, state, placed[number % table.stages_per_copy], stored, device="meta")
        shard(stage, state, dtype)
        stage.to_empty(device=state.device)
        stages[number] = stage
    return stages


def build_executor(table: Table, stages: Mapping[int, nn.Module], state: ParallelState) -> PipelineExecutor:
    """The executor of ``table`` over the pipeline group."""
    group = state.group("pp") if state.size("pp") > 1 else None
    return PipelineExecutor(table, stages, group, lambda number: reduce_gradients(stages[number]))
