"""The executor on real gloo ranks: gradients equal to those of one process, and everything that may travel does."""

from __future__ import annotations

import copy
import importlib
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.pipeline import host_transport
from r1mega.pipeline.actions import Kind, Table
from r1mega.pipeline.checker import check
from r1mega.pipeline.executor import PipelineError, PipelineExecutor, StageOutput, make_transport
from r1mega.pipeline.plain import PlainStage
from r1mega.pipeline.schedules import SCHEDULES, gpipe, make_table, one_f_one_b
from r1mega.pipeline.shared_memory import SUPPORTED
from r1mega.pipeline.transfers import Message, Program, programs
from r1mega.pipeline.transport import PeerError, ProcessGroupTransport
from tests.distributed.pool import WorkerPool

WIDTH = 6
ONE_COPY = [name for name in SCHEDULES if name != "dualpipe"]  # the stages of train_mlp follow one another

# Zero-bubble tables by hand: two ranks; four ranks; and four stages in a V on two ranks, where activations and
# gradients share each direction. In the last one rank 1 uses its messages in another order than rank 0 sends them.
BY_HAND = {
    "two ranks": (
        "0F0,0F1,0I0,0F2,0I1,0W0,0I2,0W1,0W2,0R\n"
        "1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2,1R\n"
    ),
    "four ranks": (
        "0F0,0F1,0F2,0I0,0I1,0W0,0W1,0I2,0W2,0R\n"
        "1F0,1F1,1F2,1I0,1I1,1W0,1I2,1W2,1W1,1R\n"
        "2F0,2F1,2B0,2F2,2I1,2I2,2W1,2W2,2R\n"
        "3F0,3I0,3F1,3W0,3I1,3F2,3I2,3W1,3W2,3R\n"
    ),
    "a V on two ranks": (
        "0F0,0F1,3F0,3I0,3F1,3I1,3W0,0I0,3W1,3R,0I1,0W0,0W1,0R\n"
        "1F0,2F0,1F1,2F1,2I0,1I0,2W0,2I1,1I1,1W0,2W1,1W1,1R,2R\n"
    ),
    "crossed": "0F0,0F1,0F2,0B0,0B1,0B2,0R\n1F2,1B2,1F0,1F1,1I1,1I0,1W1,1W0,1R\n",
}  # fmt: skip


class ExplicitLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: ExplicitLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        layer.calls.append("input")
        layer.weight_gradients.add(lambda: layer.add_weight_gradient(x, gradient))
        return gradient @ layer.weight, None, None


class ExplicitLinear(nn.Module):
    """A linear layer that hands over its weight gradient, and notes what was computed in which order."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.weight_gradients = None
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad or not torch.is_grad_enabled() else x.clone().requires_grad_()
        return ExplicitLinearFunction.apply(x, self.weight, self)

    def add_weight_gradient(self, x: Tensor, gradient: Tensor) -> None:
        self.calls.append("weight")
        new = gradient.t() @ x
        self.weight.grad = new if self.weight.grad is None else self.weight.grad + new


def repr_table(table: Table) -> str:
    return f"{table.num_ranks}x{table.num_microbatches}"


def mlp(num_stages: int) -> list[nn.Module]:
    torch.manual_seed(0)
    linears = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2 * num_stages)]
    return [nn.Sequential(a, nn.Tanh(), b) for a, b in zip(linears[::2], linears[1::2], strict=True)]


def squared_error(output: Tensor, microbatch: tuple[Tensor, Tensor]) -> Tensor:
    return (output - microbatch[1]).square().sum()


def microbatches(num: int, step: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets whose number of rows changes from microbatch to microbatch and from step to step."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = [1 + (5 * i + 7 * step) % 9 for i in range(num)]
    make = lambda n: torch.randn(n, WIDTH, dtype=torch.float64, generator=generator)  # noqa: E731
    return [(make(n), make(n)) for n in rows]


def largest_difference(stages: dict[int, nn.Module], reference: list[nn.Module]) -> float:
    ours = [p.grad for stage in stages.values() for p in stage.parameters()]
    theirs = [p.grad for number in stages for p in reference[number].parameters()]
    assert ours and all(gradient is not None for gradient in ours)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


Result = tuple[float, float, list[int], list[list[str]]]


def train_mlp(rank: int, world_size: int, table: Table, explicit: bool, over_gloo: bool = False) -> Result:
    """Two steps; the largest relative difference of gradients and of the loss, the reductions, the layers' calls."""
    modules = mlp(table.num_stages)
    reference = copy.deepcopy(modules)
    if explicit:
        for module in modules:
            for i in (0, 2):
                module[i] = nn.Sequential(ExplicitLinear(module[i].weight.detach()), Bias(module[i].bias.detach()))
    last = table.num_stages - 1
    stages = {s: PlainStage(modules[s], squared_error if s == last else None) for s in table.stages_of(rank)}
    reduced: list[int] = []
    group = dist.group.WORLD if world_size > 1 else None
    transport = ProcessGroupTransport(dist.group.WORLD, torch.device("cpu")) if over_gloo else None
    executor = PipelineExecutor(table, stages, group, reduced.append, transport=transport)
    loss_difference = 0.0
    for step in range(2):
        batch = microbatches(table.num_microbatches, step)
        metrics = executor.run(batch)
        loss = sum(squared_error(nn.Sequential(*reference)(m[0]), m) for m in batch)
        loss.backward()
        if last in stages:
            loss_difference = max(loss_difference, abs(metrics["loss"].item() / loss.item() - 1))
    calls = [m.calls for stage in stages.values() for m in stage.modules() if isinstance(m, ExplicitLinear)]
    return largest_difference(stages, reference), loss_difference, reduced, calls


class Bias(nn.Module):
    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def assert_same_as_one_process(results: list[Result], table: Table) -> None:
    for rank, (gradients, loss, reduced, _) in enumerate(results):
        assert gradients < 1e-12
        assert loss < 1e-12
        assert sorted(reduced) == sorted(2 * table.stages_of(rank)), "each step reduces each stage once"


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 1), (2, 5), (4, 3), (4, 8)])
@pytest.mark.parametrize("name", ONE_COPY)
def test_gradients_equal_those_of_one_process_with_changing_shapes(
    pool: WorkerPool, name: str, num_ranks: int, num_microbatches: int
) -> None:
    table = make_table(name, num_ranks, num_microbatches)
    assert_same_as_one_process(pool.run(train_mlp, num_ranks, table, False), table)


@pytest.mark.parametrize("name", ONE_COPY)
def test_gradients_over_gloo_equal_those_of_one_process_too(pool: WorkerPool, name: str) -> None:
    table = make_table(name, 4, 6)
    assert_same_as_one_process(pool.run(train_mlp, 4, table, False, True), table)


def kind_of_transport(rank: int, world_size: int, boot_ids: list[str] | None) -> str:
    """Of ranks that believe to be on machines with these numbers."""
    if boot_ids is not None:
        host_transport._machine = lambda: uuid.UUID(boot_ids[rank]).bytes
    try:
        transport = make_transport(dist.group.WORLD, torch.device("cpu"))
        ring = [Message(Kind.F, rank, 0, rank, (rank + 1) % world_size) for rank in range(world_size)]
        mine, theirs = ring[rank], ring[rank - 1]
        transport.start(Program(rank, [], {theirs.source: [theirs]}))
        transport.send(mine, (torch.full((3,), rank), torch.ones(2, 4).t()))
        number, ones = transport.receive(theirs, 0)
        assert number.tolist() == [theirs.source] * 3 and torch.equal(ones, torch.ones(4, 2))
        transport.finish()
        return type(transport).__name__
    finally:
        importlib.reload(host_transport)


def test_ranks_of_one_machine_use_its_memory_and_ranks_of_several_do_not(pool: WorkerPool) -> None:
    expected = "HostTransport" if SUPPORTED else "ProcessGroupTransport"
    assert pool.run(kind_of_transport, 3, None) == [expected] * 3
    boots = [str(uuid.UUID(int=number)) for number in (1, 1, 2)]
    assert pool.run(kind_of_transport, 3, boots) == ["ProcessGroupTransport"] * 3


def fall_back_where_nobody_answers(rank: int, world_size: int) -> str:
    """Rank 1 calls at a door that is not there, as from another network namespace."""
    if rank == 1:
        host_transport._address = lambda name: f"\0r1mega-nobody-{name.hex()}"
    try:
        return type(make_transport(dist.group.WORLD, torch.device("cpu"))).__name__
    finally:
        importlib.reload(host_transport)


def test_ranks_that_cannot_reach_each_other_all_use_the_process_group(pool: WorkerPool) -> None:
    assert pool.run(fall_back_where_nobody_answers, 3) == ["ProcessGroupTransport"] * 3


def make_executors_in_different_order(rank: int, world_size: int) -> str:
    tables = [gpipe(2, 2), one_f_one_b(2, 4)]
    for table in tables if rank == 0 else tables[::-1]:
        try:
            PipelineExecutor(table, {rank: PlainStage(mlp(2)[rank])}, dist.group.WORLD)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.skipif(not SUPPORTED, reason="process groups have no state that could be crossed")
def test_executors_made_in_different_order_are_refused(pool: WorkerPool) -> None:
    message = "the ranks of this pipeline make executors of different schedules: make them in the same order on all"
    assert pool.run(make_executors_in_different_order, 2) == [message] * 2


class FailingStage(nn.Module):
    """Breaks at one microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 7:
            raise KeyError("broken on purpose")
        return x * self.weight


def run_into_a_failure(rank: int, world_size: int) -> list[str]:
    """Rank 1 fails in its second microbatch; what each run says, of the same executors and of new ones."""
    said = []
    executor = None
    for rows in ([1, 7, 2], [1, 3, 2], [1, 3, 2]):
        if executor is None:
            stage = PlainStage(FailingStage() if rank == 1 else mlp(1)[0], squared_error if rank == 2 else None)
            executor = PipelineExecutor(one_f_one_b(3, 3), {rank: stage}, dist.group.WORLD)
        batch = [(torch.ones(n, WIDTH, dtype=torch.float64),) * 2 for n in rows]
        try:
            executor.run(batch)
            said.append("")
        except (KeyError, RuntimeError) as error:
            said.append(str(error))
            executor = executor if len(said) == 1 else None
        dist.barrier()
    return said


@pytest.mark.skipif(not SUPPORTED, reason="peers over a process group wait until its timeout")
def test_a_run_that_fails_on_one_rank_fails_on_its_peers_at_once_and_leaves_nothing_for_the_next(pool: WorkerPool):
    first, second, third = zip(*pool.run(run_into_a_failure, 3), strict=True)
    assert first[1] == "'broken on purpose'"
    assert all(text.startswith(f"pipeline rank {rank}, action ") for rank, text in enumerate(first) if rank != 1)
    assert all("rank 1: " in text for rank, text in enumerate(first) if rank != 1)
    assert all("make a new executor on all of its ranks" in text for text in second)
    assert third == ("", "", "")


@pytest.mark.parametrize("name", ONE_COPY)
def test_one_rank_needs_no_process_group(name: str) -> None:
    table = make_table(name, 1, 4)
    assert_same_as_one_process([train_mlp(0, 1, table, False)], table)


@pytest.mark.parametrize("name", BY_HAND)
def test_split_backward_gives_the_same_gradients_and_each_weight_gradient_once(pool: WorkerPool, name: str) -> None:
    table = Table.from_csv(BY_HAND[name])
    check(table)
    results = pool.run(train_mlp, table.num_ranks, table, True)
    assert_same_as_one_process(results, table)
    for *_, layers in results:
        assert layers
        for calls in layers:
            assert calls.count("weight") == calls.count("input") == 2 * table.num_microbatches


def test_a_full_backward_runs_weight_gradients_at_once_and_a_split_one_later() -> None:
    tables = "0F0,0B0,0F1,0B1,0R", "0F0,0I0,0F1,0I1,0W0,0W1,0R"
    full, split = (train_mlp(0, 1, Table.from_csv(text), True)[3] for text in tables)
    assert full == [["input", "weight"] * 4] * 2
    assert split == [["input", "input", "weight", "weight"] * 2] * 2


class MixedStage(nn.Module):
    """Hands over a tuple: hidden, an integer tensor, a float that needs no gradient, one that is not used later.

    Every stage has a loss of its own.
    """

    def __init__(self, stage: int, last: bool) -> None:
        super().__init__()
        self.stage, self.last, self.made_graph = stage, last, False
        torch.manual_seed(stage)
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, activations: tuple[Tensor, ...], microbatch: Tensor) -> StageOutput:
        if not activations:
            activations = (microbatch, torch.arange(len(microbatch)), torch.full((), 2.0), microbatch)
        hidden, numbers, scale, _ = activations
        assert numbers.dtype == torch.int64 and scale.dtype == torch.float32
        assert not scale.requires_grad
        assert hidden.requires_grad == activations[3].requires_grad == (self.stage > 0 and torch.is_grad_enabled())
        hidden = torch.tanh(self.linear(hidden)) * (1 + numbers[:, None]) * scale
        self.made_graph = hidden.requires_grad
        loss = (self.stage + 1) * hidden.square().sum()
        metrics = {f"loss {self.stage}": loss, f"rows {self.stage}": torch.tensor(len(hidden))}
        if self.last:
            return StageOutput((), (loss, hidden.sum()), metrics)
        return StageOutput((hidden, numbers + 1, scale, hidden * 3), (loss,), metrics)


def train_mixed(rank: int, world_size: int, table: Table) -> tuple[float, dict[str, float], dict[str, float]]:
    def build() -> list[MixedStage]:
        return [MixedStage(s, s == table.num_stages - 1) for s in range(table.num_stages)]

    torch.manual_seed(5)
    batch = [torch.randn(2 + m % 3, WIDTH, dtype=torch.float64) for m in range(table.num_microbatches)]
    reference, expected = build(), dict[str, float]()
    for microbatch in batch:
        activations, losses = (), []
        for stage in reference:
            output = stage(activations, microbatch)
            activations, losses = output.activations, [*losses, *output.losses]
            for name, value in output.metrics.items():
                expected[name] = expected.get(name, 0.0) + value.item()
        sum(losses).backward()
    stages = {s: build()[s] for s in table.stages_of(rank)}
    executor = PipelineExecutor(table, stages, dist.group.WORLD if world_size > 1 else None)
    metrics = executor.run(batch)
    assert all(not value.requires_grad for value in metrics.values())
    difference = largest_difference(stages, reference)
    again = executor.run(batch, forward_only=True)
    assert {n: v.item() for n, v in again.items()} == {n: v.item() for n, v in metrics.items()}
    assert not any(stage.made_graph for stage in stages.values())
    assert largest_difference(stages, reference) == difference, "forward_only must not touch gradients"
    return difference, {name: value.item() for name, value in metrics.items()}, expected


@pytest.mark.parametrize(
    "table", [one_f_one_b(4, 5), gpipe(2, 3), one_f_one_b(1, 2), Table.from_csv(BY_HAND["crossed"])], ids=repr_table
)
def test_tuples_integers_and_losses_of_every_stage(pool: WorkerPool, table: Table) -> None:
    for rank, (difference, metrics, expected) in enumerate(pool.run(train_mixed, table.num_ranks, table)):
        assert difference < 1e-12
        assert metrics == pytest.approx({name: expected[name] for name in (f"loss {rank}", f"rows {rank}")}, rel=1e-12)


class FrozenStage(nn.Module):
    """Nothing to learn and nothing that needs a gradient."""

    def forward(self, activations: tuple[Tensor, ...], microbatch: Tensor) -> StageOutput:
        return StageOutput(((activations[0] if activations else microbatch) * 2,))


def train_behind_frozen_stages(rank: int, world_size: int) -> float:
    batch = [torch.full((3, WIDTH), float(m), dtype=torch.float64) for m in range(6)]
    last = PlainStage(mlp(1)[0], lambda output, _: output.sum())
    stage = last if rank == world_size - 1 else FrozenStage()
    PipelineExecutor(one_f_one_b(world_size, 6), {rank: stage}, dist.group.WORLD).run(batch)
    if stage is not last:
        return 0.0
    reference = mlp(1)
    sum(reference[0](m * 2 ** (world_size - 1)).sum() for m in batch).backward()
    return largest_difference({0: last}, reference)


def test_stages_without_gradients_hand_none_back(pool: WorkerPool) -> None:
    assert max(pool.run(train_behind_frozen_stages, 3)) < 1e-12


class Token:
    alive = peak = 0

    def __init__(self) -> None:
        Token.alive += 1
        Token.peak = max(Token.peak, Token.alive)

    def __del__(self) -> None:
        Token.alive -= 1


class HoldToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Token()
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class HoldingStage(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return HoldToken.apply(self.inner(x))


def count_held_activations(rank: int, world_size: int, table: Table) -> tuple[int, int]:
    loss_function = squared_error if rank == world_size - 1 else None
    stage = PlainStage(HoldingStage(mlp(world_size)[rank]), loss_function)
    Token.alive = Token.peak = 0
    PipelineExecutor(table, {rank: stage}, dist.group.WORLD).run(microbatches(table.num_microbatches, 0))
    return Token.peak, Token.alive


@pytest.mark.parametrize("table", [one_f_one_b(4, 6), gpipe(2, 4)], ids=repr_table)
def test_activations_live_from_forward_to_backward_as_the_checker_counts(pool: WorkerPool, table: Table) -> None:
    peaks = check(table).peak_activations
    assert pool.run(count_held_activations, table.num_ranks, table) == [(peak, 0) for peak in peaks]


def run_while_rank_1_leaves(rank: int, world_size: int) -> str:
    stage = PlainStage(mlp(2)[rank], squared_error if rank == 1 else None)
    executor = PipelineExecutor(one_f_one_b(2, 2), {rank: stage}, dist.group.WORLD)
    if rank == 1:
        dist.destroy_process_group()
        return ""
    try:
        executor.run(microbatches(2, 0))
    except PipelineError as error:
        return str(error)
    return "no error"


def test_a_peer_that_is_gone_is_named_with_the_action_that_waits_for_it(pool: WorkerPool) -> None:
    message = pool.run(run_while_rank_1_leaves, 2)[0]
    assert message.startswith("pipeline rank 0, action 0")
    assert "rank 1: " in message
    assert "\n" not in message


def run_while_rank_1_is_silent(rank: int, world_size: int, csv: str) -> str:
    """Rank 1 lives and has connections, but takes no part; its patience is longer."""
    group = dist.new_group(list(range(world_size)), timeout=timedelta(seconds=1))
    stages = {0: PlainStage(mlp(2)[0])} if rank == 0 else {1: PlainStage(mlp(2)[1], squared_error)}
    executor = PipelineExecutor(Table.from_csv(csv), stages, group)
    message = ""
    if rank == 0:
        try:
            executor.run(microbatches(2, 0))
        except PipelineError as error:
            message = str(error)
    dist.barrier()
    return message


def test_a_hang_says_which_rank_waits_for_which_action_of_which_peer(pool: WorkerPool) -> None:
    message = pool.run(run_while_rank_1_is_silent, 2, one_f_one_b(2, 2).to_csv())[0]
    assert message.startswith(
        "pipeline rank 0, action 0B0: waited for the gradients from stage 1, microbatch 0 from rank 1: "
    )
    assert "imed out" in message


def run_while_rank_1_takes_nothing(rank: int, world_size: int) -> str:
    group = dist.new_group(list(range(world_size)), timeout=timedelta(seconds=1))
    transport = ProcessGroupTransport(group, torch.device("cpu"))
    program = programs(one_f_one_b(2, 1), forward_only=True)[rank]
    message = ""
    if rank == 0:
        transport.start(program)
        transport.send(program.steps[0][0].gives, (torch.zeros(3),))
        try:
            transport.finish()
        except PeerError as error:
            message = str(error)
    dist.barrier()
    return message


def test_a_message_that_nobody_takes_is_named(pool: WorkerPool) -> None:
    message = pool.run(run_while_rank_1_takes_nothing, 2)[0]
    assert message.startswith("waited until the activations from stage 0, microbatch 0 were taken by rank 1: ")


def test_weight_gradients_that_are_left_over_are_an_error() -> None:
    executor = PipelineExecutor(Table.from_csv("0F0,0I0,0W0,0R"), {0: PlainStage(mlp(1)[0], squared_error)}, None)
    executor.weight_gradients.run = lambda stage, microbatch: None
    with pytest.raises(RuntimeError, match="weight gradients were never computed for stage 0 microbatch 0"):
        executor.run(microbatches(1, 0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: PipelineExecutor(gpipe(1, 2), {0: s}, None).run([1]), "the schedule is for 2 microbatches, not 1"),
        (lambda s: PipelineExecutor(gpipe(2, 2), {0: s}, None), "the schedule is for 2 ranks, the process group has 1"),
        (lambda s: PipelineExecutor(gpipe(1, 2), {1: s}, None), r"rank 0 holds stages \[0\], not \[1\]"),
        (lambda s: PipelineExecutor(Table.from_csv("0F0,0R"), {0: s}, None), "rank 0, action 0B0: is missing"),
    ],
)
def test_what_does_not_fit_the_table_is_refused(build: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(FrozenStage())
