"""Draws what the bubble benchmark measured: bubbles beside the simulated ones, how far off they are, and memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.pipeline_bubble import MIB, points

OURS, THEIRS, SIMULATED = "#2f6db3", "#d9822b", "#d5d9e0"
TEXT, QUIET, GRID = "#22252b", "#6b7280", "#e8eaee"


def draw(content: dict[str, Any], path: Path) -> None:
    """Write the PNG of the benchmark's JSON ``content``, whole or not at all; panels of parts that are there."""
    from matplotlib.figure import Figure

    timed, held, computed = (content.get(part, {}) for part in ("sleeping", "counted", "computing"))
    names = list(dict.fromkeys([*timed, *held, *computed]))[::-1]  # the first on top
    panels = [(_draw_bubbles, timed, 3.0), (_draw_points, timed, 2.0), (_draw_bytes, held, 2.2)]
    panels += [(_draw_bubbles, computed, 2.2)]
    panels = [panel for panel in panels if panel[1]]
    widths = [width for *_, width in panels]
    figure = Figure(figsize=(1.4 + 1.65 * sum(widths), 1.9 + 0.44 * len(names)), dpi=130, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0]
    for axes, (draw_panel, lines, _) in zip(all_axes, panels, strict=True):
        _prepare(axes, names)
        draw_panel(axes, {names.index(name): line for name, line in lines.items()})
        if lines is computed:
            ranks = content["settings"]["computing_ranks"]
            axes.set_title(f"bubble, layers that compute, {ranks} ranks", **_title())
        elif draw_panel is _draw_bubbles:
            axes.set_title("bubble, stages that sleep", **_title())
    settings = content["settings"]
    milliseconds = "/".join(f"{number:g}" for number in settings["milliseconds"])
    figure.suptitle(
        f"Pipeline schedules on {settings['ranks']} ranks, {settings['microbatches']} microbatches; "
        f"sleeping stages: F/I/W {milliseconds} ms a stage. {content['machine']}, torch {content['versions']['torch']}",
        fontsize=9.5, color=QUIET, x=0.01, ha="left",
    )  # fmt: skip
    _legend(figure, bool(timed) and any("torch" in line for line in timed.values()))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png", facecolor="white")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _title() -> dict[str, Any]:
    return {"fontsize": 10, "fontweight": "bold", "color": TEXT, "loc": "left"}


def _prepare(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=10, color=TEXT)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=TEXT)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)


def _draw_bubbles(axes: Any, lines: dict[int, dict]) -> None:
    """A bar for the simulation, a dot for what was measured with the range of its steps."""
    for place, line in lines.items():
        axes.barh(place, 100 * line["simulated"]["bubble_rate"], height=0.72, color=SIMULATED, linewidth=0)
        for found, colour, shift in ((line.get("torch"), THEIRS, -0.17), (line["r1mega"], OURS, 0.17)):
            if found and "bubble_rate" in found:
                steps = [100 * rate for rate in found["bubble_rate_of_steps"]]
                axes.plot([min(steps), max(steps)], [place + shift] * 2, color=colour, linewidth=1.6, alpha=0.55)
                axes.plot(100 * found["bubble_rate"], place + shift, "o", color=colour, markersize=5.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("percent of the longest rank's time", fontsize=9, color=QUIET)


def _draw_points(axes: Any, lines: dict[int, dict]) -> None:
    for place, line in lines.items():
        sides = [(points(line["r1mega"], line["simulated"]), OURS, 0.17)]
        if "bubble_rate" in line.get("torch", {}):
            sides.append((points(line["torch"], line["torch"]["simulated"]), THEIRS, -0.17))
        for value, colour, shift in sides:
            axes.barh(place + shift, value, height=0.3, color=colour, linewidth=0)
            label = {"xytext": (3 if value >= 0 else -3, 0), "textcoords": "offset points", "va": "center_baseline"}
            side = "left" if value >= 0 else "right"
            axes.annotate(f"{value:+.2f}", (value, place + shift), fontsize=7.5, color=TEXT, ha=side, **label)
    axes.axvline(0, color=TEXT, linewidth=0.8)
    axes.margins(x=0.22)
    axes.set_title("measured − simulated", **_title())
    axes.set_xlabel("percentage points", fontsize=9, color=QUIET)


def _draw_bytes(axes: Any, lines: dict[int, dict]) -> None:
    """The rank that holds most."""
    for place, line in lines.items():
        axes.barh(place, max(line["simulated_peak_bytes"]) / MIB, height=0.72, color=SIMULATED, linewidth=0)
        measured = max(line["peak_bytes"]) / MIB
        axes.plot(measured, place, "o", color=OURS, markersize=5.5)
        label = f"{max(line['simulated_peak_activations']):.3g}"
        offset = {"xytext": (7, 0), "textcoords": "offset points", "va": "center_baseline"}
        axes.annotate(label, (measured, place), fontsize=8, color=QUIET, **offset)
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.set_title("held for backward, worst rank", **_title())
    axes.set_xlabel("MiB (number: microbatches, simulated)", fontsize=9, color=QUIET)


def _legend(figure: Any, with_torch: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(facecolor=SIMULATED, label="simulated")]
    handles.append(Line2D([], [], marker="o", color=OURS, label="r1mega: median and range of the steps"))
    if with_torch:
        handles.append(Line2D([], [], marker="o", color=THEIRS, label="torch.distributed.pipelining"))
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
