"""The executor does nothing twice: matrix products are counted below autograd, where nothing can hide.

Every stage of the plain and the custom model has a width of its own and every microbatch a number of rows of its own,
so the shape of a product tells what it is: the forward of a layer contracts its input width, the gradient of its input
contracts its output width, the gradient of its weight contracts the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from r1mega.config import MoEConfig
from r1mega.moe.layer import MoELayer
from r1mega.parallel_state import Layout, ParallelState
from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.executor import PipelineExecutor, StageOutput
from r1mega.pipeline.plain import PlainStage
from r1mega.pipeline.schedules import SCHEDULES, make_table, with_recomputation
from tests.distributed.pool import WorkerPool
from tests.distributed.test_pipeline_executor import ExplicitLinear

RANKS, MICROBATCHES = 2, 5
aten = torch.ops.aten
Product = tuple[int, int, int]  # [a, b] @ [b, c]


class CountProducts(TorchDispatchMode):
    """All matrix products that run inside, by shape; ``late`` are those of the W actions."""

    def __init__(self, executor: PipelineExecutor) -> None:
        super().__init__()
        self.all: Counter[Product] = Counter()
        self.late: Counter[Product] = Counter()
        self._is_late = False
        self._wrapped, executor.weight_gradients.run = executor.weight_gradients.run, self._run_late

    def _run_late(self, stage: int, microbatch: int) -> None:
        self._is_late = True
        self._wrapped(stage, microbatch)
        self._is_late = False

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            left, right = args[0:2] if function.overloadpacket is aten.mm else args[1:3]
            product = (left.shape[0], left.shape[1], right.shape[1])
            self.all[product] += 1
            if self._is_late:
                self.late[product] += 1
        else:
            assert function.overloadpacket not in (aten.bmm, aten.baddbmm), "a product that nobody counts"
        return function(*args, **(kwargs or {}))


def width_in(stage: int) -> int:
    return 20 + stage


def rows(microbatch: int) -> int:
    return 3 + microbatch


def plain_layer(stage: int) -> nn.Module:
    return nn.Linear(width_in(stage), width_in(stage + 1))


def custom_layer(stage: int) -> nn.Module:
    return ExplicitLinear(torch.randn(width_in(stage + 1), width_in(stage)))


def table_of(name: str, recompute: bool) -> Table:
    table = make_table(name, RANKS, MICROBATCHES)
    return with_recomputation(table) if recompute else table


def count_products(
    rank: int, world_size: int, name: str, recompute: bool, layer: Callable[[int], nn.Module]
) -> tuple[Counter[Product], Counter[Product]]:
    table = table_of(name, recompute)
    depth = table.stages_per_copy
    stages = {
        number: PlainStage(
            nn.Sequential(layer(number % depth), nn.Tanh()),
            (lambda output, _: output.sum()) if table.next_stage(number) is None else None,
        )
        for number in table.stages_of(rank)
    }
    batch = [torch.randn(rows(m), width_in(0)) for m in range(MICROBATCHES)]
    executor = PipelineExecutor(table, stages, dist.group.WORLD)
    with CountProducts(executor) as counted:
        executor.run(batch)
    return counted.all, counted.late


def expected_products(table: Table, rank: int, from_first: bool) -> tuple[Counter[Product], Counter[Product]]:
    """All products, and those of W; ``from_first``: the first stage has an input gradient, too."""
    everything: Counter[Product] = Counter()
    late: Counter[Product] = Counter()
    actions = set(table.actions(rank))
    for number in table.stages_of(rank):
        stage = number % table.stages_per_copy
        a, b = width_in(stage), width_in(stage + 1)
        for microbatch in table.microbatches_of(number):
            r = rows(microbatch)
            computed_again = Action(Kind.C, number, microbatch) in actions
            # nobody waits for the result of the last stage: with recomputation its one forward is the C
            everything[r, a, b] += 2 if computed_again and table.next_stage(number) is not None else 1
            everything[b, r, a] += 1
            if stage > 0 or from_first:
                everything[r, b, a] += 1
            if Action(Kind.W, number, microbatch) in actions:
                late[b, r, a] += 1
    return everything, late


def transposed(products: Counter[Product]) -> Counter[Product]:
    """A weight gradient may be computed as its transpose."""
    sizes = {rows(microbatch) for microbatch in range(MICROBATCHES)}
    found: Counter[Product] = Counter()
    for (a, b, c), count in products.items():
        found[(max(a, c), b, min(a, c)) if b in sizes else (a, b, c)] += count
    return found


@pytest.mark.parametrize("layer", [plain_layer, custom_layer])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_forward_input_gradient_and_weight_gradient_is_computed_once(
    pool: WorkerPool, name: str, recompute: bool, layer: Callable[[int], nn.Module]
) -> None:
    table = table_of(name, recompute)
    results = pool.run(count_products, RANKS, name, recompute, layer)
    for rank, (everything, late) in enumerate(results):
        # nobody wants the gradient of the model's input; the custom layer computes it all the same
        expected, expected_late = expected_products(table, rank, from_first=layer is custom_layer)
        assert transposed(everything) == expected
        assert transposed(late) == expected_late, "weight gradients of split backwards run in W, all others do not"


HIDDEN, LENGTH = 16, 8


class MoEStage(nn.Module):
    """A mixture of experts with a shared expert, and the router's loss; stage 0 embeds, so that all have an input."""

    def __init__(self, state: ParallelState, is_first: bool, is_last: bool) -> None:
        super().__init__()
        config = MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=12, num_shared_experts=1, aux_loss_coefficient=0.1)
        self.embedding = nn.Embedding(7, HIDDEN) if is_first else None
        self.moe = MoELayer(HIDDEN, config, state)
        self.is_last = is_last

    def forward(self, activations: tuple[Tensor, ...], microbatch: Tensor) -> StageOutput:
        (x,) = activations if self.embedding is None else (self.embedding(microbatch),)
        output, losses = self.moe(x, LENGTH, MICROBATCHES)
        x = x + output
        if self.is_last:
            return StageOutput(losses=(x.square().sum(), *losses.values()))
        return StageOutput((x,), tuple(losses.values()))


def multiply_adds(products: Counter[Product]) -> int:
    return sum(a * b * c * count for (a, b, c), count in products.items())


def count_moe(rank: int, world_size: int, name: str, recompute: bool) -> tuple[int, int, int, list[bool]]:
    """Multiply-adds of a step, those in W, those of all forwards; and whether each parameter got a gradient."""
    table, state = table_of(name, recompute), ParallelState(Layout(world_size, pp=world_size))
    stages = {
        number: MoEStage(state, table.previous_stage(number) is None, table.next_stage(number) is None)
        for number in table.stages_of(rank)
    }
    batch = [torch.arange(LENGTH * (1 + m % 3)) % 7 for m in range(MICROBATCHES)]
    executor = PipelineExecutor(table, stages, dist.group.WORLD)
    with CountProducts(executor) as counted:
        executor.run(batch)
    with CountProducts(executor) as forwards:
        executor.run(batch, forward_only=True)
    got = [parameter.grad is not None for stage in stages.values() for parameter in stage.parameters()]
    return multiply_adds(counted.all), multiply_adds(counted.late), multiply_adds(forwards.all), got


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_of_a_mixture_of_experts_costs_three_forwards_and_a_fourth_with_recomputation(
    pool: WorkerPool, name: str, recompute: bool
) -> None:
    table = table_of(name, recompute)
    for rank, (total, late, forwards, got) in enumerate(pool.run(count_moe, RANKS, name, recompute)):
        actions = list(table.actions(rank))
        of = {kind: {action[1:] for action in actions if action.kind is kind} for kind in Kind}
        # all stages cost the same for a microbatch, in proportion to its length
        cost = {key: 1 + key[1] % 3 for key in of[Kind.F]}
        unit, remainder = divmod(forwards, sum(cost.values()))
        assert remainder == 0 and unit > 0
        again = sum(cost[key] for key in of[Kind.C] if table.next_stage(key[0]) is not None)
        assert total == unit * (3 * sum(cost.values()) + again)
        assert late == unit * sum(cost[key] for key in of[Kind.W])
        assert all(got)
