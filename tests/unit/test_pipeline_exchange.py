"""Overlapped forwards and backwards: who runs when, and the same gradients as one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r1mega.pipeline.actions import Table
from r1mega.pipeline.exchange import Cut, Steps, at_once, exchange_at_once, keeping
from r1mega.pipeline.executor import PipelineExecutor, StageOutput

OVERLAPPED = "0F0,(0F1;0B0),(0F2;0I1),0W1,0B2,0R"
ONE_BY_ONE = "0F0,0F1,0B0,0F2,0I1,0W1,0B2,0R"


class Doubling:
    """A communication that gives back twice what it is sent, and notes when it is started and waited for."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def start(self, *inputs: Tensor) -> Answer:
        return Answer(self.log, f"{self.name} forward", inputs)

    def start_backward(self, *gradients: Tensor) -> Answer:
        return Answer(self.log, f"{self.name} backward", gradients)


class Answer:
    def __init__(self, log: list[str], name: str, tensors: tuple[Tensor, ...]) -> None:
        log.append(f"start {name}")
        self.log, self.name, self.tensors = log, name, tensors

    def wait(self) -> tuple[Tensor, ...]:
        self.log.append(f"wait {self.name}")
        return tuple(2 * tensor for tensor in self.tensors)


class TwoExchanges(nn.Module):
    """A residual layer around two exchanges, with a loss in front of the first."""

    can_step = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 3, dtype=torch.float64)
        self.log: list[str] = []

    def forward(self, activations: tuple[Tensor, ...], microbatch: Any, stepwise: bool = False) -> Any:
        steps = self.steps(microbatch)
        if stepwise:
            return steps
        output, losses = at_once(steps)
        output.losses = (*losses, *output.losses)
        return output

    def steps(self, microbatch: tuple[str, Tensor]) -> Steps[StageOutput]:
        name, x = microbatch
        hidden = self.first(x)
        sent, (hidden,) = yield from keeping(self.inner(name, hidden.tanh()), hidden)
        loss = (hidden + sent).square().sum()
        return StageOutput((), (loss,), {"loss": loss})

    def inner(self, name: str, x: Tensor) -> Steps[Tensor]:
        early_loss = x.sum() * 0.1
        (there, also), (x,) = yield Cut((x, x.detach()), Doubling(self.log, f"{name} there"), (x,), (early_loss,))
        (plain,), () = yield Cut((self.second(there) * also,), None)
        (back,), (x,) = yield Cut((plain + x,), Doubling(self.log, f"{name} back"), (x,))
        return back * x


def run(rows: str) -> tuple[TwoExchanges, list[Tensor], Tensor]:
    torch.manual_seed(0)
    stage = TwoExchanges()
    table = Table.from_csv(rows)
    data = [(str(i), torch.randn(4, 3, dtype=torch.float64)) for i in range(table.num_microbatches)]
    loss = PipelineExecutor(table, {0: stage}, None).run(data)["loss"]
    return stage, [parameter.grad for parameter in stage.parameters() if parameter.grad is not None], loss


def test_overlapping_does_not_change_a_gradient() -> None:
    overlapped, one_by_one = run(OVERLAPPED), run(ONE_BY_ONE)
    torch.testing.assert_close(overlapped[2], one_by_one[2])
    assert len(overlapped[1]) == 4
    for actual, expected in zip(overlapped[1], one_by_one[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_each_runs_while_the_other_s_communication_is_under_way() -> None:
    log = run("0F0,(0F1;0B0),0B1,0R")[0].log
    assert log[4:12] == [
        "start 1 there forward",
        "start 0 back backward",
        "wait 1 there forward",
        "start 1 back forward",
        "wait 0 back backward",
        "start 0 there backward",
        "wait 1 back forward",
        "wait 0 there backward",
    ]


def test_a_table_without_overlaps_waits_at_once() -> None:
    log = run(ONE_BY_ONE)[0].log
    pairs: Iterator[tuple[str, str]] = zip(log[::2], log[1::2], strict=True)
    assert all(wait == start.replace("start", "wait") for start, wait in pairs)


def test_an_exchange_at_once_is_differentiable() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: exchange_at_once(Doubling([], "x"), x)[0] * weight, (x,))


class VectorLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, activations: tuple[Tensor, ...], microbatch: Any) -> StageOutput:
        return StageOutput(losses=(self.weight * 2,))


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    executor = PipelineExecutor(Table.from_csv("0F0,0B0,0R"), {0: VectorLoss()}, None)
    with pytest.raises(ValueError, match=r"is a scalar, not of shape \[3\]"):
        executor.run([None])
