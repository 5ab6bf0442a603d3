"""Draws a simulated schedule as text: one line a rank, one column a slice of time."""

from __future__ import annotations

import os
import shutil
import sys
from bisect import bisect_right
from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple

from r1mega.pipeline.actions import PER_STEP, Overlap
from r1mega.pipeline.simulator import Simulation, Span

# Foreground and background of the 256 colours that terminals have, for a rank's first stage and for its others.
COLOURS = {
    "F": ("255;48;5;25", "16;48;5;110"),
    "B": ("16;48;5;208", "16;48;5;222"),
    "I": ("16;48;5;208", "16;48;5;222"),
    "W": ("255;48;5;28", "16;48;5;114"),
    "C": ("255;48;5;97", "16;48;5;182"),
    "&": ("255;48;5;125", "16;48;5;211"),
}
MEANINGS = {
    "F": "forward",
    "B": "backward",
    "I": "backward of the input",
    "W": "backward of the weights",
    "C": "forward computed again",
    "&": "forward and backward overlapped",
    "R": "gradients reduced",
    "O": "optimizer step",
}
LEAST_COLUMNS = 20


class Terminal(NamedTuple):
    """What a text is drawn on: its width in columns, whether it has colours, and more than ASCII."""

    width: int = 100
    colour: bool = False
    unicode: bool = True

    @classmethod
    def of_stdout(cls) -> Terminal:
        """The one that standard output leads to; 120 columns where it leads to none. Heeds NO_COLOR."""
        width = shutil.get_terminal_size((120, 24)).columns
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        try:
            "·─█░×".encode(sys.stdout.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return cls(width, colour, unicode=False)
        return cls(width, colour)


def timeline(simulation: Simulation, terminal: Terminal = Terminal()) -> str:  # noqa: B008
    """Ranks from top to bottom, time from left to right; before each rank's line what it idles and holds.

    An action is its letter, its microbatch if there is room, and a line as long as it takes; those of a rank's stages
    but the first are in small letters. Where actions are hardly longer than a column, each column shows what takes
    most of its time.

    The drawing is as wide as the terminal, but never so narrow that nothing can be seen.
    """
    title = "rank  bubble   peak  weights  "
    columns = max(LEAST_COLUMNS, terminal.width - len(title) - 1)
    lane = _Lane(simulation, columns, terminal)
    lines = [f"{title}0{f'{simulation.makespan:,.6g}':>{columns - 1}}"]
    for rank, held in enumerate(zip(simulation.busy, simulation.peak_activations, simulation.weights, strict=True)):
        busy, peak, weights = held
        idle = max(0.0, 1 - busy / simulation.makespan) if simulation.makespan else 0.0
        lines.append(f"{rank:4}{idle:8.1%}{peak:7.4g}{weights:9.4g}  {lane.draw(rank)}")
    return "\n".join([*lines, "", lane.legend()])


class _Lane:
    """Draws the line of a rank, and the legend for all."""

    def __init__(self, simulation: Simulation, columns: int, terminal: Terminal) -> None:
        self.simulation, self.columns, self.colour = simulation, columns, terminal.colour
        self.step = simulation.makespan / columns
        self.idle, self.line = ("·", "─") if terminal.unicode else (".", "-")
        lengths = [span.end - span.start for row in simulation.spans for span in row if span.end > span.start]
        self.crowded = sum(lengths) < 1.5 * self.step * len(lengths)
        self.label_columns = 1 + len(str(simulation.table.num_microbatches - 1))

    def draw(self, rank: int) -> str:
        row = [span for span in self.simulation.spans[rank] if span.end > span.start]
        first_stage = min(self.simulation.table.stages_of(rank))
        if self.crowded:
            return "".join(self._slice(row, column, first_stage) for column in range(self.columns))
        lane = []
        for span, run in groupby(self._seen(row)):
            length = len(list(run))
            lane.append(self.idle * length if span is None else self._block(span, length, first_stage))
        return "".join(lane)

    def _seen(self, row: list[Span]) -> list[Span | None]:
        """For each column the span in its middle."""
        seen: list[Span | None] = []
        position = 0
        for column in range(self.columns):
            time = (column + 0.5) * self.step
            while position < len(row) and row[position].end <= time:
                position += 1
            inside = position < len(row) and row[position].start <= time
            seen.append(row[position] if inside else None)
        return seen

    def _slice(self, row: list[Span], column: int, first_stage: int) -> str:
        """One column: what takes most of its time."""
        start, end = column * self.step, (column + 1) * self.step
        shares = {(self.idle, False): self.step}
        for span in row[bisect_right(row, start, key=lambda span: span.end) :]:
            if span.start >= end:
                break
            key, time = (_mark(span), span.actions[0].stage != first_stage), min(span.end, end) - max(span.start, start)
            shares[key] = shares.get(key, 0.0) + time
            shares[self.idle, False] -= time
        mark, later = max(shares, key=lambda key: shares[key])
        return self._painted(mark.lower() if later else mark, mark, later)

    def _block(self, span: Span, length: int, first_stage: int) -> str:
        action, mark = span.actions[0], _mark(span)
        # whether there is room depends on the time alone, not on where the columns lie: all numbers or none
        room = (span.end - span.start) // self.step >= self.label_columns
        label = f"{mark}{action.microbatch}" if room and action.kind not in PER_STEP else mark
        later = action.stage != first_stage
        block = (label.lower() if later else label).ljust(length, " " if self.colour else self.line)
        return self._painted(block, mark, later)

    def _painted(self, text: str, mark: str, later: bool) -> str:
        return f"\033[38;5;{COLOURS[mark][later]}m{text}\033[0m" if self.colour and mark in COLOURS else text

    def legend(self) -> str:
        spans = self.simulation.spans
        shown = {_mark(span) for row in spans for span in row if span.end > span.start}
        words = [f"{self._painted(mark, mark, False)} {MEANINGS[mark]}" for mark in MEANINGS if mark in shown]
        if any(len(self.simulation.table.stages_of(rank)) > 1 for rank in range(len(spans))):
            words.append("small letters: the rank's other stages")
        column = f"one column is {self.step:.4g}" + ", and shows what takes most of it" * self.crowded
        return f"""\
{"   ".join([*words, f"{self.idle} idle"])}
{column}; bubble: idle share of the whole step
peak: activations held at once, 1 is one microbatch of one rank's share of the model; weights: 1 is that share"""


def _mark(span: Span) -> str:
    """What a span is, as one character: its kind, or & for an overlap."""
    return "&" if isinstance(span.cell, Overlap) else str(span.cell.kind)


def bars(simulations: Mapping[str, Simulation], columns: int = 40, unicode: bool = True) -> dict[str, str]:
    """For each schedule a bar as long as its step: work in full blocks, what ranks idle in light ones."""
    longest = max((simulation.makespan for simulation in simulations.values()), default=0.0) or 1.0
    full, light = ("█", "░") if unicode else ("#", ".")
    drawn = {}
    for name, simulation in simulations.items():
        length = columns * simulation.makespan / longest
        work = round(length * (1 - simulation.bubble_rate_makespan))
        drawn[name] = full * work + light * (round(length) - work)
    return drawn
