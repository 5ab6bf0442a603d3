"""Times a schedule without running it: when each action starts and ends, how long ranks idle, what they hold."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from r1mega.pipeline.actions import Action, Kind, Overlap, ScheduleError, Table
from r1mega.pipeline.costs import Costs
from r1mega.pipeline.transfers import Message, Program, Step, programs


class Span(NamedTuple):
    """When a rank runs a cell of its row."""

    cell: Action | Overlap
    start: float
    end: float

    @property
    def actions(self) -> tuple[Action, ...]:
        """One, or the two of an overlap."""
        return tuple(self.cell) if isinstance(self.cell, Overlap) else (self.cell,)


@dataclass(frozen=True)
class Simulation:
    """A schedule in time. The clock begins at 0, when the first action can start; its unit is that of the costs.

    Args:
        table: the schedule.
        spans: for each rank its cells with their times, in the order of its row.
    """

    table: Table
    spans: list[list[Span]]

    @property
    def makespan(self) -> float:
        """From the start of the step to the end of the last action of any rank."""
        return max((row[-1].end for row in self.spans if row), default=0.0)

    @property
    def longest_rank(self) -> float:
        """The longest time that any one rank takes from the start of its first action to the end of its last."""
        return max((row[-1].end - row[0].start for row in self.spans if row), default=0.0)

    @property
    def busy(self) -> list[float]:
        """For each rank the sum of its actions' times: all that is not bubble, recomputation too."""
        return [sum(span.end - span.start for span in row) for row in self.spans]

    @property
    def bubble_rate(self) -> float:
        """The share of time that ranks idle, each rank counted for as long as the longest one takes.

        ``1 - mean(busy) / longest_rank``. Where all ranks have the same work that is the Zero Bubble paper's
        ``1 - m (F + I + W) / cost`` (arXiv 2401.10241): there the waiting of the later ranks for their first
        microbatch, and of the early ones after their last, is no bubble, since the next step can begin meanwhile. Where
        stages are uneven, the time that light ranks wait for heavy ones counts as bubble, too.
        """
        return _idle_share(self.busy, self.longest_rank)

    @property
    def bubble_rate_makespan(self) -> float:
        """The share of time that ranks idle in the whole step: ``1 - mean(busy) / makespan``.

        Never less than :attr:`bubble_rate`. It is what a clock around a single step shows.
        """
        return _idle_share(self.busy, self.makespan)

    @property
    def peak_activations(self) -> list[float]:
        """For each rank the most activations that it holds at once; 1.0 is one microbatch of one rank's layers.

        Activations are held from the start of the F (of the C, where they are computed again) to the end of the B, or
        of the W where the backward is split. One rank's layers are the model divided by the number of ranks. All stages
        count alike, so where they are uneven this counts microbatches, not bytes.
        """
        return [max((held for _, held in self.activations(rank)), default=0.0) for rank in range(len(self.spans))]

    @property
    def weights(self) -> list[float]:
        """For each rank the weights that it holds; 1.0 is the model divided by the number of ranks."""
        return [len(self.table.stages_of(rank)) * self._share for rank in range(len(self.spans))]

    def activations(self, rank: int) -> list[tuple[float, float]]:
        """What ``rank`` holds over time, as (time, activations from then on); units as :attr:`peak_activations`."""
        recomputed = {action[1:] for action in self.table.actions(rank) if action.kind is Kind.C}
        held, steps = 0, []
        for span in self.spans[rank]:
            begun = sum(a.kind is (Kind.C if a[1:] in recomputed else Kind.F) for a in span.actions)
            ended = sum(a.kind in (Kind.B, Kind.W) for a in span.actions)
            steps += [(span.start, (held + begun) * self._share)] if begun else []
            steps += [(span.end, (held + begun - ended) * self._share)] if ended else []
            held += begun - ended
        return steps

    @property
    def _share(self) -> float:
        """A stage, as a part of a rank's share of the model."""
        return len(self.spans) / self.table.stages_per_copy


def simulate(table: Table, costs: Costs) -> Simulation:
    """Time ``table``.

    A rank runs its row in order. An action starts when its rank is free and what it takes is there: that is
    ``costs.communication`` after the end of the action that made it, or at once where both run on the same rank, since
    nothing travels then. An overlap starts when both of its parts can, and both hand on what they made at its end.
    Messages never wait for each other, nor for the receiver.

    Raises ValueError where ``costs`` are for another number of stages, ScheduleError where an action waits for ever
    (see :mod:`r1mega.pipeline.checker` for everything else that can be wrong with a table).
    """
    times = costs.by_kind(table.stages_per_copy)
    durations = {kind: by_stage * table.num_copies for kind, by_stage in times.items()}
    ranks = programs(table)
    spans: list[list[Span]] = [[] for _ in ranks]
    arrival: dict[Message | None, float] = {None: 0.0}
    waiting: dict[Message | None, int] = {}  # what a rank waits for -> the rank
    ready = deque(range(len(ranks)))
    while ready:
        rank = ready.popleft()
        row, steps, done = table.rows[rank], ranks[rank].steps, spans[rank]
        now = done[-1].end if done else 0.0
        while len(done) < len(row):
            together = steps[len(done)]
            arrived = _last_arrival(together, arrival)
            if arrived is None:
                waiting[next(step.takes for step in together if step.takes not in arrival)] = rank
                break
            start = max(now, arrived)
            now = start + _duration(together, durations, costs.overlap)
            done.append(Span(row[len(done)], start, now))
            for step in together:
                if (gives := step.gives) is not None:
                    arrival[gives] = now if gives.source == gives.destination else now + costs.communication
                    if gives in waiting:
                        ready.append(waiting.pop(gives))
    if waiting:
        _report_deadlock(ranks, spans, waiting)
    return Simulation(table, spans)


def _last_arrival(together: tuple[Step, ...], arrival: dict[Message | None, float]) -> float | None:
    """When all that the steps take is there; None if something has not been sent yet."""
    last = 0.0
    for step in together:
        time = arrival.get(step.takes)
        if time is None:
            return None
        if time > last:
            last = time
    return last


def _duration(together: tuple[Step, ...], durations: dict[Kind, list[float]], overlap: float) -> float:
    if len(together) == 1:
        action = together[0].action
        return durations[action.kind][action.stage]
    return overlap * sum(durations[step.action.kind][step.action.stage] for step in together)


def _report_deadlock(ranks: list[Program], spans: list[list[Span]], waiting: dict[Message | None, int]) -> None:
    message, rank = min(waiting.items(), key=lambda item: item[1])
    assert message is not None
    together = ranks[rank].steps[len(spans[rank])]
    action = next(step.action for step in together if step.takes == message)
    raise ScheduleError(rank, action, f"waits for ever for {message} on rank {message.source}")


def _idle_share(busy: list[float], duration: float) -> float:
    if not duration:
        return 0.0
    return max(0.0, 1 - sum(busy) / len(busy) / duration)  # rounding must not make a negative share
