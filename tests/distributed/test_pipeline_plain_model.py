"""A plain torch model under every schedule, two copies included: tied embedding, losses on each stage, new shapes.

Embedding and head share one weight. Ranks and copies of the model that hold it sum their
gradients after the step, as any user of tied weights has to.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import PipelineExecutor, StageOutput
from r1mega.pipeline.schedules import SCHEDULES, make_table, with_recomputation
from tests.distributed.pool import WorkerPool

VOCABULARY, WIDTH, STEPS = 11, 6, 3


class Net(nn.Module):
    """Embedding, ``depth`` blocks and the head; a stage has some of it."""

    def __init__(self, blocks: list[int], depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.depth = depth
        self.blocks = nn.ModuleDict()
        for number in blocks:
            torch.manual_seed(1 + number)
            layers = [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)]
            self.blocks[str(number)] = nn.Sequential(*layers)
        if 0 in blocks:
            self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=1, _weight=weight)
            self.embedding.weight = weight
        if depth - 1 in blocks:
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.head.weight = weight

    def forward(self, activations: tuple[Tensor, ...], tokens: Tensor, checkpointed: bool = False) -> StageOutput:
        """``tokens`` is ``[sequences, length]``. Each block has a loss of its own, the last one predicts the tokens."""
        x = activations[0] if activations else self.embedding(tokens)
        losses = []
        for number, block in self.blocks.items():
            x = x + (checkpoint(block, x, use_reentrant=False) if checkpointed else block(x))
            losses.append((1 + int(number)) * x.square().mean())
        if str(self.depth - 1) not in self.blocks:
            return StageOutput((x,), tuple(losses))
        return StageOutput(losses=(*losses, nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())))


class Stage(Net):
    def __init__(self, stage: int, depth: int, checkpointed: bool) -> None:
        super().__init__([stage], depth)
        self.checkpointed = checkpointed

    def forward(self, activations: tuple[Tensor, ...], tokens: Tensor) -> StageOutput:
        return super().forward(activations, tokens, self.checkpointed)


def tie(stages: list[Stage]) -> None:
    """What one rank holds of the shared weight is one parameter (the V of ZBV, the two ends of DualPipe)."""
    weights = [stage.embedding.weight for stage in stages if hasattr(stage, "embedding")]
    for stage in stages:
        if weights and hasattr(stage, "head"):
            stage.head.weight = weights[0]


def tokens_of(step: int, microbatch: int) -> Tensor:
    """Lengths and numbers of sequences change from microbatch to microbatch and from step to step."""
    generator = torch.Generator().manual_seed(100 * step + microbatch)
    shape = 1 + (microbatch + step) % 2, 2 + (3 * microbatch + 5 * step) % 7
    return torch.randint(0, VOCABULARY, shape, generator=generator)


def train(rank: int, world_size: int, table: Table, checkpointed: bool) -> list[dict[str, Tensor]]:
    """The gradients of each step, summed over all that hold a parameter; on rank 0."""
    depth = table.stages_per_copy
    stages = {number: Stage(number % depth, depth, checkpointed).double() for number in table.stages_of(rank)}
    tie(list(stages.values()))
    executor = PipelineExecutor(table, stages, dist.group.WORLD)
    found = []
    for step in range(STEPS):
        executor.run([tokens_of(step, m) for m in range(table.num_microbatches)])
        named = [pair for stage in stages.values() for pair in stage.named_parameters()]
        mine = [(name, p.grad) for name, p in {p: (name, p) for name, p in named}.values()]
        everyone: list[list[tuple[str, Tensor]]] = [[] for _ in range(world_size)]
        dist.all_gather_object(everyone, mine)
        total: dict[str, Tensor] = {}
        for name, gradient in (pair for part in everyone for pair in part):
            name = name.replace("head", "embedding")
            total[name] = total[name] + gradient if name in total else gradient
        found.append(total)
        for stage in stages.values():
            stage.zero_grad(set_to_none=step == 0)
    return found if rank == 0 else []


def expected(table: Table) -> list[dict[str, Tensor]]:
    net = Net(list(range(table.stages_per_copy)), table.stages_per_copy).double()
    found = []
    for step in range(STEPS):
        net.zero_grad()
        for microbatch in range(table.num_microbatches):
            sum(net((), tokens_of(step, microbatch)).losses).backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters()})
    return found


def assert_same(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, gradient in other.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 5), (4, 10)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_equal_those_of_one_process(
    pool: WorkerPool, name: str, num_ranks: int, num_microbatches: int
) -> None:
    table = make_table(name, num_ranks, num_microbatches)
    assert_same(pool.run(train, num_ranks, table, False)[0], expected(table))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_with_recomputation(pool: WorkerPool, name: str) -> None:
    table = with_recomputation(make_table(name, 2, 5))
    assert_same(pool.run(train, 2, table, False)[0], expected(table))


@pytest.mark.parametrize("name", ["1f1b", "zbv", "dualpipe"])
def test_the_same_with_the_checkpoints_of_torch_inside_the_stages(pool: WorkerPool, name: str) -> None:
    table = make_table(name, 2, 5)
    assert_same(pool.run(train, 2, table, True)[0], expected(table))
