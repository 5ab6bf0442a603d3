"""Runs a schedule table: every rank runs its row, stages are plain modules, messages are derived from the table."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from r1mega.pipeline.actions import Action, Kind, Overlap, Table
from r1mega.pipeline.checker import check
from r1mega.pipeline.exchange import Part, backward, backward_of_parts, gradient_or_zeros, in_parts
from r1mega.pipeline.host_transport import connect
from r1mega.pipeline.transfers import Message, Program, Step, programs
from r1mega.pipeline.transport import PeerError, ProcessGroupTransport, Transport
from r1mega.pipeline.weight_gradient import WeightGradientStore, split_weight_gradients

Tensors = tuple[Tensor, ...]
Act = Generator[None, None, Tensors]


@dataclass(slots=True)
class StageOutput:
    """What a stage returns for one microbatch.

    Args:
        activations: tensors for the next stage, of any shape and type; empty on the last stage.
        losses: scalars that are differentiated with gradient 1, on whichever stage they arise.
        metrics: tensors that are summed over microbatches.
    """

    activations: tuple[Tensor, ...] = ()
    losses: tuple[Tensor, ...] = ()
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class _Saved:
    """What a backward needs: the inputs that want a gradient, and where the graph of the outputs begins.

    Edges and not tensors, so that the memory of an output can go as soon as it has been sent.
    """

    inputs: list[Tensor]
    activations: list[GradientEdge | None]
    losses: list[Tensor]
    parts: Sequence[Part]


class _RandomState:
    """The random state before a forward that will be computed again, so that dropout draws the same."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
        self._cpu = torch.get_rng_state()
        self._cuda = [torch.cuda.get_rng_state(device) for device in self._devices]

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            for device, state in zip(self._devices, self._cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class PipelineError(RuntimeError):
    """A run that broke because of another rank. Names this rank, the action, and the rank that it waited for."""


class PipelineExecutor:
    """Runs a table on this rank, again and again.

    Making one is a collective call of the pipeline's ranks: those that make several make them in the same order. After
    a run that failed, on any rank, make new ones.

    Args:
        table: the schedule; checked here.
        stages: the stages of this rank by number. A stage is called ``stage(activations, microbatch)`` with a tuple of
            tensors (empty on stage 0) and returns a :class:`StageOutput`. Modules in it with an attribute
            ``weight_gradients`` get the store of this executor; where the table splits backwards into I and W, torch's
            own linear and embedding layers do, too (:func:`split_weight_gradients`).
        group: the ranks of the pipeline in the order of the table; None where the table has one rank.
        reduce_gradients: what R calls with the number of the stage.
        optimizer_step: what O calls with the number of the stage.
        transport: moves messages, and ``group`` is not asked; by default what :func:`make_transport` gives.

    Raises:
        ScheduleError: the table cannot run.
        ValueError: stages or group do not fit the table.
    """

    def __init__(
        self,
        table: Table,
        stages: Mapping[int, nn.Module],
        group: dist.ProcessGroup | None,
        reduce_gradients: Callable[[int], None] | None = None,
        optimizer_step: Callable[[int], None] | None = None,
        transport: Transport | None = None,
    ) -> None:
        check(table)
        self.rank, num_ranks = 0, 1
        if transport is not None:
            self.rank, num_ranks = transport.rank, transport.num_ranks
        elif group is not None:
            self.rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        if num_ranks != table.num_ranks:
            raise ValueError(f"the schedule is for {table.num_ranks} ranks, the process group has {num_ranks}")
        if sorted(stages) != table.stages_of(self.rank):
            raise ValueError(f"rank {self.rank} holds stages {table.stages_of(self.rank)}, not {sorted(stages)}")
        self.table, self.stages = table, dict(stages)
        self._num_microbatches = table.num_microbatches
        self.weight_gradients = WeightGradientStore()
        self._reduce_gradients, self._optimizer_step = reduce_gradients, optimizer_step
        self._programs = {only: programs(table, forward_only=only)[self.rank] for only in (False, True)}
        if transport is None and group is not None and num_ranks > 1:
            transport = make_transport(group, _device_of(stages.values(), group), table)
        self._transport = transport
        self._local: dict[Message, tuple[Tensor, ...]] = {}
        self._recomputed = {action[1:] for action in table.actions(self.rank) if action.kind is Kind.C}
        self._overlaps = any(isinstance(cell, Overlap) for cell in table.rows[self.rank])
        self._inputs: dict[tuple[int, int], tuple[tuple[Tensor, ...], _RandomState]] = {}
        self._saved: dict[tuple[int, int], _Saved] = {}
        self._split = {action[1:] for action in table.actions(self.rank) if action.kind is Kind.I}
        for number in {stage for stage, _ in self._split}:
            split_weight_gradients(stages[number])
        layers = (layer for stage in stages.values() for layer in stage.modules())
        self._layers: list[Any] = [layer for layer in layers if hasattr(layer, "weight_gradients")]
        self._set_store()

    def run(self, microbatches: Sequence[Any], forward_only: bool = False) -> dict[str, Tensor]:
        """Run the table once; gradients are added to those that the parameters hold.

        Args:
            microbatches: what every stage gets, one for each microbatch of the table; shapes may differ.
            forward_only: run the F actions alone, without a graph.

        Returns:
            The metrics of this rank's stages, summed over microbatches (on the device: nothing here waits for a GPU).

        Raises:
            PipelineError: a peer died or did not answer.
            RuntimeError: a layer's weight gradients were never computed.
        """
        if len(microbatches) != self._num_microbatches:
            raise ValueError(f"the schedule is for {self._num_microbatches} microbatches, not {len(microbatches)}")
        for left_by_a_failed_run in (self._local, self._inputs, self._saved, self.weight_gradients.pending):
            left_by_a_failed_run.clear()
        self._set_store()  # another executor over the same stages may have set its own
        metrics: dict[str, Tensor] = {}
        program = self._programs[forward_only]
        with torch.set_grad_enabled(not forward_only):
            self._run_steps(program, microbatches, metrics)
        self.weight_gradients.require_empty()
        return metrics

    def _set_store(self) -> None:
        for layer in self._layers:
            layer.weight_gradients = self.weight_gradients

    def _run_steps(self, program: Program, microbatches: Sequence[Any], metrics: dict[str, Tensor]) -> None:
        at: object = "the start"
        try:
            if self._transport is not None:
                self._transport.start(program)
            for together in program.steps:
                at = together[0].action
                if len(together) == 1:
                    self._run_one(together[0], microbatches, metrics)
                    continue
                taken = []
                for step in together:
                    at = step.action
                    taken.append(self._take(step))
                acts = [self._act(s.action, t, microbatches, metrics) for s, t in zip(together, taken, strict=True)]
                given = _alternate(acts)
                for step, tensors in zip(together, given, strict=True):
                    if step.gives is not None:
                        self._give(step.gives, tensors)
            at = "the end of the schedule"
            if self._transport is not None:
                self._transport.finish()
        except BaseException as error:
            if self._transport is not None:
                self._transport.give_up()
            if isinstance(error, PeerError):
                raise PipelineError(f"pipeline rank {self.rank}, action {at}: {error}") from error
            raise

    def _run_one(self, step: Step, microbatches: Sequence[Any], metrics: dict[str, Tensor]) -> None:
        # in a function of its own, so that what was given is not held while the next action runs
        tensors = _finish(self._act(step.action, self._take(step), microbatches, metrics))
        if step.gives is not None:
            self._give(step.gives, tensors)

    def _act(
        self, action: Action, taken: Tensors, microbatches: Sequence[Any], metrics: dict[str, Tensor]
    ) -> Tensors | Act:
        """Do ``action`` with what it took; its result, or what does it, pausing while a communication is under way."""
        kind, stage, microbatch = action
        if kind is Kind.F:
            return self._forward(action, taken, microbatches[microbatch], metrics)
        if kind is Kind.B or kind is Kind.I:
            return self._backward(action, taken)
        if kind is Kind.W:
            self.weight_gradients.run(stage, microbatch)
        elif kind is Kind.C:
            self._compute_again(action, microbatches[microbatch], metrics)
        elif kind is Kind.R and self._reduce_gradients is not None:
            self._reduce_gradients(stage)
        elif kind is Kind.O and self._optimizer_step is not None:
            self._optimizer_step(stage)
        return ()

    def _forward(self, action: Action, inputs: Tensors, microbatch: Any, metrics: dict[str, Tensor]) -> Tensors | Act:
        key, stage = action[1:], self.stages[action.stage]
        if not torch.is_grad_enabled():
            output = stage(inputs, microbatch)
            _add_metrics(metrics, output.metrics)
            return output.activations
        if key in self._recomputed:
            self._inputs[key] = inputs, _RandomState(inputs)
            if self.table.next_stage(action.stage) is None:
                return ()  # nobody waits for a result: the C computes it
            with torch.no_grad():
                output = stage(inputs, microbatch)
            # without a graph nobody knows yet which of them need a gradient
            return tuple(t.detach().requires_grad_(t.is_floating_point()) for t in output.activations)
        return self._compute(key, inputs, microbatch, metrics)

    def _compute_again(self, action: Action, microbatch: Any, metrics: dict[str, Tensor]) -> None:
        key = action[1:]
        inputs, random_state = self._inputs.pop(key)
        with random_state.restored():
            _finish(self._compute(key, inputs, microbatch, metrics))

    def _compute(
        self, key: tuple[int, int], inputs: Tensors, microbatch: Any, metrics: dict[str, Tensor]
    ) -> Tensors | Act:
        """The forward with a graph, which ends where the stage communicates if backwards are to run beside forwards."""
        stage = self.stages[key[0]]
        if self._overlaps and getattr(stage, "can_step", False):
            return self._compute_in_parts(key, inputs, microbatch, metrics)
        self.weight_gradients.will_split = key in self._split
        return self._save(key, inputs, stage(inputs, microbatch), metrics)

    def _compute_in_parts(
        self, key: tuple[int, int], inputs: Tensors, microbatch: Any, metrics: dict[str, Tensor]
    ) -> Act:
        self.weight_gradients.will_split = key in self._split
        output, parts, losses = yield from in_parts(self.stages[key[0]](inputs, microbatch, stepwise=True))
        return self._save(key, inputs, output, metrics, parts, losses)

    def _save(
        self,
        key: tuple[int, int],
        inputs: Tensors,
        output: StageOutput,
        metrics: dict[str, Tensor],
        parts: Sequence[Part] = (),
        losses: Tensors = (),
    ) -> Tensors:
        """Keep what the backward needs; the activations."""
        # every floating-point activation of a forward computed again will get a gradient, even one that needs none
        again = key in self._recomputed
        announced = [t for t in output.activations if t.requires_grad or (again and t.is_floating_point())]
        self._saved[key] = _Saved(
            [tensor for tensor in inputs if tensor.requires_grad],
            [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in announced],
            [loss for loss in (*losses, *output.losses) if loss.requires_grad],
            parts,
        )
        _add_metrics(metrics, output.metrics)
        return output.activations

    def _backward(self, action: Action, gradients: Tensors) -> Tensors | Act:
        key = action[1:]
        saved = self._saved.pop(key)
        assert len(gradients) == len(saved.activations), f"{action}: the last stage must not return activations"
        pairs = zip(saved.activations, gradients, strict=True)
        roots = [(edge, gradient) for edge, gradient in pairs if edge is not None] + [(x, None) for x in saved.losses]
        if saved.parts:
            return self._backward_in_parts(action, saved, roots)
        # checkpoints inside a stage compute it again in its backward, and must find what the forward found
        self.weight_gradients.will_split = key in self._split
        with self._deferred(action):
            backward(roots)
        return tuple(gradient_or_zeros(tensor) for tensor in saved.inputs)

    def _backward_in_parts(self, action: Action, saved: _Saved, roots: Sequence[tuple[Any, Tensor | None]]) -> Act:
        self.weight_gradients.will_split = action[1:] in self._split
        with self._deferred(action):
            backward(roots)
            yield from backward_of_parts(saved.parts)
        return tuple(gradient_or_zeros(tensor) for tensor in saved.inputs)

    def _deferred(self, action: Action) -> AbstractContextManager[None]:
        """Keeps the weight gradients of an I for its W."""
        return self.weight_gradients.deferred(*action[1:]) if action.kind is Kind.I else nullcontext()

    def _take(self, step: Step) -> tuple[Tensor, ...]:
        message = step.takes
        if message is None:
            return ()
        if message.source == message.destination:
            return self._local.pop(message)
        assert self._transport is not None
        return self._transport.receive(message, step.acknowledged)

    def _give(self, message: Message, tensors: tuple[Tensor, ...]) -> None:
        if message.source == message.destination:
            self._local[message] = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
        else:
            assert self._transport is not None
            self._transport.send(message, tensors)


def make_transport(group: dist.ProcessGroup, device: torch.device, table: Table | None = None) -> Transport:
    """Shared memory between ranks of one machine whose tensors are on the CPU, else the process group's messages.

    A collective call. Raises ValueError where ``table`` is not the same on all ranks (as far as they compare).
    """
    shared = connect(group, "" if table is None else table.to_csv()) if device.type == "cpu" else None
    return ProcessGroupTransport(group, device) if shared is None else shared


def _device_of(stages: Iterable[nn.Module], group: dist.ProcessGroup) -> torch.device:
    """Where the stages are; without parameters and buffers, where those of other ranks must be."""
    for stage in stages:
        for tensor in chain(stage.parameters(), stage.buffers()):
            return tensor.device
    on_gpus = "nccl" in dist.get_backend_config(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


def _finish(act: Tensors | Act) -> Tensors:
    """Its result, once it has run to its end."""
    return act if isinstance(act, tuple) else _alternate([act])[0]


def _alternate(acts: Sequence[Tensors | Act]) -> list[Tensors]:
    """Run those that pause, each until it does, in turn; the results of all."""
    results: dict[int, Any] = dict(enumerate(acts))
    while pausing := {number: act for number, act in results.items() if not isinstance(act, tuple)}:
        for number, act in pausing.items():
            try:
                next(act)
            except StopIteration as end:
                results[number] = end.value
    return list(results.values())


def _add_metrics(metrics: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
