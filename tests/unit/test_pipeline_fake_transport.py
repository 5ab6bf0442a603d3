"""The executor itself on random tables: all ranks as threads of this process, messages through queues."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import PipelineExecutor, StageOutput
from r1mega.pipeline.schedules import SCHEDULES, make_table, with_recomputation
from r1mega.pipeline.transfers import Message, Program

PATIENCE = 20.0  # seconds until a message counts as lost


class QueueTransport:
    """Rank ``rank`` of ``num_ranks``; ``queues[source, destination]`` carries messages in order."""

    def __init__(self, rank: int, num_ranks: int, queues: dict[tuple[int, int], Queue]) -> None:
        self.rank, self.num_ranks, self.queues = rank, num_ranks, queues
        self.arrived: dict[Message, tuple[Tensor, ...]] = {}

    def start(self, program: Program) -> None:
        self.expected = {source: list(messages) for source, messages in program.incoming.items()}

    def send(self, message: Message, tensors: tuple[Tensor, ...]) -> None:
        sent = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors)
        self.queues[message.source, message.destination].put((message, sent))

    def receive(self, message: Message, acknowledged: int) -> tuple[Tensor, ...]:
        while message not in self.arrived:
            first, tensors = self.queues[message.source, self.rank].get(timeout=PATIENCE)
            assert first == self.expected[message.source].pop(0), "both ends agree on the order"
            self.arrived[first] = tensors
        return self.arrived.pop(message)

    def give_up(self) -> None:
        pass

    def finish(self) -> None:
        assert not self.arrived and not any(self.expected.values()), "every message was taken"


class Scale(nn.Module):
    """``y = w x`` with a weight gradient that a schedule can put off; the last stage returns the loss ``sum(y)``."""

    def __init__(self, weight: float, is_last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.weight_gradients: Any = None
        self.is_last = is_last

    def forward(self, activations: tuple[Tensor, ...], microbatch: Tensor) -> StageOutput:
        (x,) = activations or (microbatch.clone().requires_grad_(),)
        y = _Scale.apply(x, self.weight, self)
        return StageOutput((), (y.sum(),)) if self.is_last else StageOutput((y,))


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stage):
        ctx.save_for_backward(x)
        ctx.stage = stage
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        weight = ctx.stage.weight

        def add() -> None:
            gradient = (grad * x).sum()
            weight.grad = gradient if weight.grad is None else weight.grad + gradient

        ctx.stage.weight_gradients.add(add)
        return grad * weight.detach(), None, None


def run(table: Table, microbatches: list[Tensor], weights: list[float]) -> dict[int, float]:
    """Run ``table`` with a thread a rank; the weight gradient of each stage, copies summed."""
    queues = {(a, b): Queue() for a in range(table.num_ranks) for b in range(table.num_ranks)}
    count = table.stages_per_copy
    stages = [Scale(weights[s % count], table.next_stage(s) is None) for s in range(table.num_stages)]
    reduced: list[int] = []
    errors: list[BaseException] = []

    def rank_program(rank: int) -> Callable[[], None]:
        def work() -> None:
            try:
                mine = {stage: stages[stage] for stage in table.stages_of(rank)}
                transport = QueueTransport(rank, table.num_ranks, queues)
                PipelineExecutor(table, mine, None, reduced.append, transport=transport).run(microbatches)
            except BaseException as error:  # noqa: BLE001 - handed to the test's thread
                errors.append(error)

        return work

    threads = [threading.Thread(target=rank_program(rank), daemon=True) for rank in range(table.num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert sorted(reduced) == list(range(table.num_stages)), "every stage is reduced once"
    found = dict.fromkeys(range(count), 0.0)
    for number, stage in enumerate(stages):
        found[number % count] += 0.0 if stage.weight.grad is None else stage.weight.grad.item()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_random_tables_run_to_their_end_with_the_right_gradients(name: str) -> None:
    chance = random.Random(name)
    for _ in range(8):
        num_ranks, num_microbatches = chance.randint(1, 16), chance.randint(1, 16)
        chunks = SCHEDULES[name].chunks or chance.randint(1, 3)
        table = make_table(name, num_ranks, num_microbatches, chunks)
        if chance.random() < 0.3:
            table = with_recomputation(table)
        weights = [chance.uniform(0.5, 2.0) for _ in range(table.stages_per_copy)]
        microbatches = [torch.rand(chance.randint(1, 3), dtype=torch.float64) for _ in range(num_microbatches)]
        whole = math.prod(weights) * sum(x.sum().item() for x in microbatches)
        for stage, gradient in run(table, microbatches, weights).items():
            assert gradient == pytest.approx(whole / weights[stage], rel=1e-12), f"{name}, stage {stage}"
