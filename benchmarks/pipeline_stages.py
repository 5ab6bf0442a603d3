"""Pipeline stages that time themselves, for the bubble benchmark: some that sleep, some that compute.

What an action takes is measured inside the stage, from the moment its work begins to the moment it ends; all that the
library around it adds (waiting, moving tensors, Python) lies between actions, and so counts as bubble.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.kernels.linear import linear, linears
from r1mega.kernels.rms_norm import rms_norm
from r1mega.kernels.swiglu import swiglu
from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.executor import StageOutput
from r1mega.pipeline.simulator import Simulation, Span
from r1mega.pipeline.weight_gradient import WeightGradientStore

Moment = Any  # seconds, or a CUDA event
Microbatch = tuple[int, Tensor]  # its number, and the input of stage 0


class Clock:
    """Tells the time of an action. On a GPU that is when the GPU comes to it, not when Python does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cycles_per_second = 0.0
        if device.type == "cuda":
            torch.cuda._sleep(1000)  # the first launch takes long
            self.start()
            torch.cuda._sleep(100_000_000)
            self._cycles_per_second = 100_000_000 / (self.seconds(self.now()) - self._start)

    def start(self) -> None:
        """Set the clock of this rank; call it right after a barrier."""
        self._start = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self._start = time.monotonic()
            self._first = self.now()

    def now(self) -> Moment:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: Moment) -> float:
        """On the clock that all ranks of this machine share. Waits for a GPU."""
        if self.device.type != "cuda":
            return moment
        moment.synchronize()
        return self._start + self._first.elapsed_time(moment) / 1e3

    def sleep(self, seconds: float) -> None:
        """Let the rank (on a GPU: the stream) do nothing for so long."""
        if self.device.type == "cuda":
            torch.cuda._sleep(int(seconds * self._cycles_per_second))
        else:
            time.sleep(seconds)


class Recorder:
    """Notes when the actions of this rank begin and end."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._noted: list[tuple[Kind, int, int, Moment, Moment]] = []

    def note(self, kind: Kind, stage: int, microbatch: int, begin: Moment) -> None:
        """An action that began then ends now."""
        self._noted.append((kind, stage, microbatch, begin, self.clock.now()))

    def take(self) -> list[Span]:
        """What was noted since the last call, in the order of its end."""
        seconds = self.clock.seconds
        spans = [Span(Action(*action), seconds(begin), seconds(end)) for *action, begin, end in self._noted]
        self._noted.clear()
        return spans


class SleepingStage(nn.Module):
    """A stage whose F, I and W each sleep; a B sleeps for I and W. Nothing is computed but sums, inside these times.

    Args:
        number: of the stage in its schedule.
        is_last: it has the loss.
        seconds: of F, I, W.
        hidden_size: width of the tensors that travel.
        recorder: is told of every sleep.
    """

    def __init__(
        self, number: int, is_last: bool, seconds: Sequence[float], hidden_size: int, recorder: Recorder
    ) -> None:
        super().__init__()
        self.number, self.is_last, self.recorder = number, is_last, recorder
        self.seconds = dict(zip((Kind.F, Kind.I, Kind.W), seconds, strict=True))
        self.weight_gradients: WeightGradientStore | None = None
        self.weight = nn.Parameter(torch.zeros(hidden_size, device=recorder.clock.device))

    def sleep(self, kind: Kind, microbatch: int, begin: Moment) -> None:
        """End an action that began then. Only what cannot be spared is done after a sleep: it finds cold caches."""
        self.recorder.clock.sleep(self.seconds[kind])
        self.recorder.note(kind, self.number, microbatch, begin)

    def add_weight_gradient(self, microbatch: int, gradient: Tensor) -> None:
        begin = self.recorder.clock.now()
        gradient = gradient.flatten(0, -2).sum(0)
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient
        self.sleep(Kind.W, microbatch, begin)

    def forward(self, activations: tuple[Tensor, ...], microbatch: Microbatch) -> StageOutput:
        begin = self.recorder.clock.now()
        index, first_input = microbatch
        given = activations[0] if activations else first_input.clone().requires_grad_()
        activation = _Sleep.apply(given, self, index).view_as(given)  # as layers end, in an operation of torch's own
        output = StageOutput(losses=(activation.mean(),)) if self.is_last else StageOutput((activation,))
        self.sleep(Kind.F, index, begin)
        return output


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: SleepingStage, microbatch: int) -> Tensor:
        ctx.stage, ctx.microbatch = stage, microbatch
        return x + stage.weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stage, microbatch = ctx.stage, ctx.microbatch
        begin = stage.recorder.clock.now()
        of_input = gradient.clone()  # as of a layer, a new tensor
        work = partial(stage.add_weight_gradient, microbatch, gradient)
        stage.sleep(Kind.I, microbatch, begin)
        stage.weight_gradients.add(work)  # which runs it now, in a B
        return of_input, None, None


class GatedLayer(nn.Module):
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``, the feed-forward half of a transformer layer."""

    def __init__(self, hidden_size: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight_gradients: WeightGradientStore | None = None
        self.norm = nn.Parameter(torch.ones(hidden_size, device=device))
        self.gate, self.up = (nn.Parameter(0.02 * torch.randn(width, hidden_size, device=device)) for _ in range(2))
        self.down = nn.Parameter(0.02 * torch.randn(hidden_size, width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        store = self.weight_gradients
        gate, up = linears(rms_norm(x, self.norm, 1e-6, store), (self.gate, self.up), store)
        return x + linear(swiglu(gate, up), self.down, store)


class GatedStage(nn.Module):
    """A stage that computes ``num_layers`` of :class:`GatedLayer`; other arguments as :class:`SleepingStage`."""

    def __init__(
        self, number: int, is_last: bool, num_layers: int, hidden_size: int, width: int, recorder: Recorder
    ) -> None:
        super().__init__()
        self.number, self.is_last, self.recorder = number, is_last, recorder
        self.weight_gradients: WeightGradientStore | None = None
        device = recorder.clock.device
        self.layers = nn.Sequential(*(GatedLayer(hidden_size, width, device) for _ in range(num_layers)))
        self._backward_began: Moment | None = None
        self._weights_began: Moment | None = None

    def forward(self, activations: tuple[Tensor, ...], microbatch: Microbatch) -> StageOutput:
        begin = self.recorder.clock.now()
        index, first_input = microbatch
        given = activations[0] if activations else first_input.clone().requires_grad_()
        inner = self.layers(_Mark.apply(given, partial(self._end_backward, index)))
        output = _Mark.apply(inner, self._begin_backward)
        self.recorder.note(Kind.F, self.number, index, begin)
        return StageOutput(losses=(output.mean(),)) if self.is_last else StageOutput((output,))

    def _begin_backward(self) -> None:
        self._backward_began = self.recorder.clock.now()
        assert self.weight_gradients is not None
        self.weight_gradients.add(self._begin_weights)

    def _end_backward(self, microbatch: int) -> None:
        assert self.weight_gradients is not None
        split = self._weights_began is None
        self.weight_gradients.add(partial(self._end_weights, microbatch))
        kind = Kind.I if split else Kind.B
        self.recorder.note(kind, self.number, microbatch, self._backward_began)
        self._backward_began = None

    def _begin_weights(self) -> None:
        """The first of the weight-gradient works: of a W, or in the midst of a B."""
        self._weights_began = self.recorder.clock.now()

    def _end_weights(self, microbatch: int) -> None:
        if self._backward_began is None:
            self.recorder.note(Kind.W, self.number, microbatch, self._weights_began)
        self._weights_began = None


class _Mark(torch.autograd.Function):
    """Calls ``passed()`` when the gradient comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passed: Callable[[], None]) -> Tensor:
        ctx.passed = passed
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.passed()
        return gradient, None


def time_steps(step: Callable[[], object], recorder: Recorder, num_warmup: int, num_steps: int) -> list[Simulation]:
    """Run ``step`` again and again, each time from a barrier. A collective.

    Returns:
        What happened in each step after the warm-up on all ranks, in seconds from the first action, on rank 0; an
        empty list on the others. Its table is empty.
    """
    timed = []
    for i in range(num_warmup + num_steps):
        dist.barrier()
        recorder.clock.start()
        step()
        mine = recorder.take()
        rows: list[list[Span]] | None = [[]] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, rows)
        if i >= num_warmup and rows is not None:
            timed.append(_from_zero(rows))
    return timed


def _from_zero(rows: list[list[Span]]) -> Simulation:
    first = min(span.start for row in rows for span in row)
    spans = [sorted((Span(cell, start - first, end - first) for cell, start, end in row), key=_start) for row in rows]
    return Simulation(Table([], []), spans)


def _start(span: Span) -> float:
    return span.start


def rates(timed: list[Simulation]) -> dict[str, Any]:
    """The bubble rates of some steps, and how long their actions took, for JSON."""
    found: dict[str, Any] = {}
    for name in ("bubble_rate", "bubble_rate_makespan", "longest_rank"):
        of_steps = [getattr(simulation, name) for simulation in timed]
        found |= {name: statistics.median(of_steps), f"{name}_of_steps": of_steps}
    by_kind: dict[str, list[float]] = defaultdict(list)
    for simulation in timed:
        for span in (span for row in simulation.spans for span in row):
            by_kind[span.actions[0].kind].append(span.end - span.start)
    found["mean_seconds"] = {kind: statistics.mean(values) for kind, values in sorted(by_kind.items())}
    found["actions_per_step"] = {kind: len(values) // len(timed) for kind, values in sorted(by_kind.items())}
    return found
