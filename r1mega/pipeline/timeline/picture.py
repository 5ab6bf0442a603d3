"""Draws simulated schedules as a PNG: a panel a schedule, one lane a rank, on one axis of time."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from r1mega.pipeline.actions import PER_STEP, Action, Kind
from r1mega.pipeline.simulator import Simulation

# For a rank's first stage, and for its others.
COLOURS = {
    Kind.F: ("#3b6fb6", "#a9c4e8"),
    Kind.B: ("#e07b39", "#f6c9a4"),
    Kind.I: ("#e0a526", "#f5dc9b"),
    Kind.W: ("#3f9b63", "#aedcbd"),
    Kind.C: ("#8a63b0", "#d2bfe6"),
    Kind.R: ("#444444", "#444444"),
    Kind.O: ("#111111", "#111111"),
}
MEANINGS = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward, input",
    Kind.W: "backward, weights",
    Kind.C: "recompute",
    Kind.R: "reduce gradients",
    Kind.O: "optimizer step",
}
IDLE, TEXT, QUIET, PEAK = "#ececf0", "#22252b", "#6b7280", "#b9bfca"
LANE = 0.86  # height of a lane, of the distance between two
# Inches:
WIDTH, LEFT, TIME_WIDTH, MEMORY_WIDTH, GAP = 15.0, 0.55, 12.2, 1.75, 0.25
TOP, TITLE, BOTTOM = 0.4, 0.5, 0.6
DIGIT, MARGIN = 0.058, 0.03  # what the number of a microbatch needs
FONT, SMALL_FONT = 6.5, 5.0  # points; the small one is for the halves of an overlap
MOST_LABELS = 32  # ranks that are named one by one


def picture(simulations: Mapping[str, Simulation]) -> bytes:
    """The PNG of schedules by name, drawn below each other on one scale; at least one."""
    buffer = io.BytesIO()
    draw(simulations).savefig(buffer, format="png")
    return buffer.getvalue()


def draw(simulations: Mapping[str, Simulation]) -> Any:
    """The same as a matplotlib Figure."""
    from matplotlib.figure import Figure

    all_lanes = sum(len(simulation.spans) for simulation in simulations.values())
    lane = min(max(18 / all_lanes, 0.14), 0.34, 200 / all_lanes)
    panels = [lane * len(simulation.spans) for simulation in simulations.values()]
    total = TOP + sum(panels) + len(panels) * TITLE + BOTTOM
    figure = Figure(figsize=(WIDTH, total), dpi=130, facecolor="white")
    longest = max(simulation.makespan for simulation in simulations.values()) or 1.0
    heaviest = max(max(simulation.peak_activations) for simulation in simulations.values()) or 1.0
    position = total - TOP
    for (name, simulation), height in zip(simulations.items(), panels, strict=True):
        position -= TITLE + height

        def panel(left: float, width: float, bottom: float = position, height: float = height) -> Any:
            box = (left / WIDTH, bottom / total, width / WIDTH, height / total)
            return _axes(figure, box, len(simulation.spans))  # noqa: B023  called before the loop goes on

        lanes = panel(LEFT, TIME_WIDTH)
        lanes.set_xlim(0, longest)
        _draw_lanes(lanes, simulation, longest, lane)
        _draw_title(lanes, name, simulation)
        memory = panel(LEFT + TIME_WIDTH + GAP, MEMORY_WIDTH)
        memory.set_xlim(0, heaviest * 1.2)
        _draw_memory(memory, simulation, heaviest)
    lanes.xaxis.set_visible(True)
    lanes.set_xlabel("time, in the unit of the costs", fontsize=8, color=QUIET)
    _draw_legend(figure, simulations, 1 - 0.08 / total)
    return figure


def _axes(figure: Any, box: tuple[float, float, float, float], num_ranks: int) -> Any:
    """Axes with a lane for each rank and nothing else."""
    axes = figure.add_axes(box)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_yticks([])
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7.5, colors=QUIET)
    return axes


def _draw_lanes(axes: Any, simulation: Simulation, longest: float, lane: float) -> None:
    """``longest``: time at the end of the axis; ``lane``: inches from a lane to the next."""
    from matplotlib.collections import PolyCollection

    num_ranks = len(simulation.spans)
    named = range(0, num_ranks, -(-num_ranks // MOST_LABELS))
    axes.set_yticks(named, [f"rank {rank}" for rank in named], color=TEXT)
    axes.barh(range(num_ranks), simulation.makespan, height=LANE, color=IDLE, linewidth=0)
    boxes: dict[str, list[list[tuple[float, float]]]] = defaultdict(list)
    digits = len(str(simulation.table.num_microbatches - 1))
    for action, start, end, low, high, later in _boxes(simulation):
        boxes[COLOURS[action.kind][later]].append([(start, low), (end, low), (end, high), (start, high)])
        size = FONT if high - low > 0.9 * LANE else SMALL_FONT
        wide = (end - start) / longest * TIME_WIDTH >= DIGIT * digits + MARGIN
        if wide and (high - low) * lane >= size / 72 and action.kind not in PER_STEP:
            colour = TEXT if later or action.kind is Kind.I else "white"
            place = {"ha": "center", "va": "center_baseline", "fontsize": size, "color": colour}
            axes.text((start + end) / 2, (low + high) / 2, str(action.microbatch), **place)
    crowded = sum(map(len, boxes.values())) > 400 * num_ranks
    for colour, polygons in boxes.items():
        axes.add_collection(PolyCollection(polygons, facecolor=colour, edgecolor="white", lw=0 if crowded else 0.5))


def _boxes(simulation: Simulation) -> Iterator[tuple[Action, float, float, float, float, bool]]:
    """For each action that takes time: start, end, top, bottom, and whether it is of a rank's other stages.

    The two parts of an overlap lie on each other, each half as high as a lane.
    """
    for rank, row in enumerate(simulation.spans):
        first_stage = min(simulation.table.stages_of(rank))
        for span in row:
            height = LANE / len(span.actions)
            for i, action in enumerate(span.actions):
                if span.end > span.start:
                    low = rank - LANE / 2 + i * height
                    yield action, span.start, span.end, low, low + height, action.stage != first_stage


def _draw_title(axes: Any, name: str, simulation: Simulation) -> None:
    rates = f"{simulation.bubble_rate:.1%} by the longest rank, {simulation.bubble_rate_makespan:.1%} by the whole step"
    facts = f"bubble {rates}      step {simulation.makespan:,.5g}      weights {max(simulation.weights):.3g}×"
    axes.text(
        0, 1, name, transform=_above(axes), fontsize=11, fontweight="bold", color=TEXT, va="bottom", parse_math=False
    )
    axes.text(1, 1, facts, transform=_above(axes), fontsize=8.5, color=QUIET, va="bottom", ha="right")


def _above(axes: Any) -> Any:
    """Coordinates in which 0 to 1 are the ends of ``axes``, shifted up a little."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transAxes + ScaledTranslation(0, 0.06, axes.figure.dpi_scale_trans)


def _draw_memory(axes: Any, simulation: Simulation, heaviest: float) -> None:
    peaks = simulation.peak_activations
    axes.barh(range(len(peaks)), peaks, height=LANE * 0.7, color=PEAK, linewidth=0)
    if len(peaks) <= MOST_LABELS:
        for rank, peak in enumerate(peaks):
            axes.text(peak + heaviest * 0.03, rank, f"{peak:.3g}", fontsize=7, color=TEXT, va="center_baseline")
    title = f"peak {max(peaks):.3g} microbatches"
    axes.text(0, 1, title, transform=_above(axes), fontsize=8.5, color=QUIET, va="bottom")


def _draw_legend(figure: Any, simulations: Mapping[str, Simulation], y: float) -> None:
    from matplotlib.patches import Patch

    boxes = [box for simulation in simulations.values() for box in _boxes(simulation)]
    shown = {action.kind for action, *_ in boxes}
    handles = [Patch(facecolor=COLOURS[kind][0], label=MEANINGS[kind]) for kind in MEANINGS if kind in shown]
    handles.append(Patch(facecolor=IDLE, label="idle"))
    if any(later for *_, later in boxes):
        handles.append(Patch(facecolor=COLOURS[Kind.F][1], label="the rank's other stages, likewise"))
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=((LEFT - 0.1) / WIDTH, y),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        handlelength=1.1,
        handleheight=1.1,
        columnspacing=1.6,
    )
