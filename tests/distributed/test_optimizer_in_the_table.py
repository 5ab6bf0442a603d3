"""O in a table: a stage steps as soon as its gradients are reduced, while others still run backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.pipeline.plain import PlainStage
from r1mega.pipeline.schedules import make_table, with_recomputation
from tests.distributed.pool import WorkerPool

WIDTH, MICROBATCHES, STEPS = 5, 4, 2


def with_steps(table: Table) -> Table:
    """``table`` with an O right after each R."""
    rows = [
        [cell for each in row for cell in ([each, each._replace(kind=Kind.O)] if each[0] is Kind.R else [each])]
        for row in table.rows
    ]
    return Table(table.stage_to_rank, rows, table.num_copies)


def layer(stage: int) -> nn.Module:
    torch.manual_seed(stage)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh()).double()


def data(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(2 + m, WIDTH, generator=generator, dtype=torch.float64) for m in range(MICROBATCHES)]


def loss(output: Tensor, _: Tensor) -> Tensor:
    return output.square().sum()


def train(rank: int, world_size: int, table: Table) -> tuple[dict[int, list[Tensor]], list[str]]:
    """The weights of this rank's stages after some steps, and what R and O called in the last one."""
    layers = {number: layer(number) for number in table.stages_of(rank)}
    optimizers = {number: torch.optim.AdamW(each.parameters(), lr=0.1) for number, each in layers.items()}
    called: list[str] = []

    def step(number: int) -> None:
        called.append(f"{number}O")
        optimizers[number].step()
        optimizers[number].zero_grad()

    early = any(action.kind is Kind.O for action in table.actions(rank))
    stages = {n: PlainStage(each, loss if table.next_stage(n) is None else None) for n, each in layers.items()}
    executor = PipelineExecutor(
        table, stages, dist.group.WORLD if world_size > 1 else None, lambda number: called.append(f"{number}R"), step
    )
    for number in range(STEPS):
        called.clear()
        executor.run(data(number))
        if not early:
            for each in layers:
                step(each)
    return {number: [p.detach() for p in each.parameters()] for number, each in layers.items()}, called


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", ["1f1b", "looped-bfs", "zbv"])
def test_steps_in_the_table_give_the_weights_of_steps_after_the_run(
    pool: WorkerPool, name: str, recompute: bool
) -> None:
    table = make_table(name, 2, MICROBATCHES)
    table = with_recomputation(table) if recompute else table
    for rank, ((mine, called), (others, _)) in enumerate(
        zip(pool.run(train, 2, with_steps(table)), pool.run(train, 2, table), strict=True)
    ):
        assert called == [f"{a.stage}{kind}" for a in table.actions(rank) if a.kind is Kind.R for kind in "RO"]
        for number, weights in others.items():
            for weight, expected, first in zip(mine[number], weights, layer(number).parameters(), strict=True):
                assert torch.equal(weight, expected) and not torch.equal(weight, first)


def test_a_stage_steps_while_another_of_its_rank_still_runs_backward() -> None:
    table = with_steps(make_table("looped-bfs", 1, MICROBATCHES))
    row = table.rows[0]
    assert row.index(Action(Kind.O, 1)) < row.index(Action(Kind.B, 0, 0))
    weights, called = train(0, 1, table)
    assert called == ["1R", "1O", "0R", "0O"]
    expected, _ = train(0, 1, make_table("looped-bfs", 1, MICROBATCHES))
    for number in (0, 1):
        torch.testing.assert_close(weights[number], expected[number], rtol=0, atol=0)
