"""What a run reports: ``metrics.jsonl``, the same numbers for TensorBoard, and ``loss.png``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from r1mega.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
LOAD_PREFIX = "expert_load/"  # and the router's name: its busiest expert's tokens over the mean of its experts
CLOCK_FIELDS = ("step_seconds", "tokens_per_second")


class MetricsWriter:
    """Appends one JSON object a step to ``metrics.jsonl``, and the same numbers to TensorBoard.

    Args:
        folder: the run's output folder.
        last_step: the step that the run goes on from; lines of later steps are dropped.
    """

    def __init__(self, folder: Path, last_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / METRICS_FILE
        truncate(self._path, last_step)
        self._file: IO[str] = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        # purge_step: TensorBoard forgets what an interrupted run wrote after the checkpoint.
        self._board = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=last_step + 1 if last_step else None)

    def write(self, metrics: Mapping[str, int | float]) -> None:
        """Write one step; ``metrics["step"]`` says which. The line is flushed."""
        self._file.write(json.dumps({name: _plain(value) for name, value in metrics.items()}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, global_step=metrics["step"])

    def sync(self) -> None:
        """Put all lines so far on the disk, so that no checkpoint is ahead of its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """All whole lines of a ``metrics.jsonl``; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def truncate(path: Path, last_step: int) -> None:
    """Drop the lines after ``last_step`` and a last line that was cut off, in place or not at all."""
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= last_step]
        write_whole(path, "".join(kept))


def _plain(value: int | float) -> int | float | None:
    """JSON has no NaN and no infinity: null."""
    return value if math.isfinite(value) else None


CURVES = {"loss": "training", "mtp_loss": "training, multi-token prediction", "valid_loss": "validation"}


def plot_loss(metrics: list[dict], path: Path) -> None:
    """Draw the losses over the tokens seen (and the steps), as a PNG.

    Args:
        metrics: lines of ``metrics.jsonl``.
        path: file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, label in CURVES.items():
        points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
        if points:
            _draw_curve(axes, points, label, marker="o" if name == "valid_loss" else None)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    _add_token_axis(axes, metrics)
    save_figure(figure, path)


def _draw_curve(axes, points: list[tuple[int, float]], label: str, marker: str | None) -> None:  # noqa: ANN001
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, label=f"{label} (last {values[-1]:.3f})", linewidth=1.4, marker=marker, markersize=4)


def _add_token_axis(axes, metrics: list[dict]) -> None:  # noqa: ANN001
    """A second horizontal axis in tokens, as every step has the same number of them."""
    if not metrics:
        return
    per_step = metrics[-1]["tokens"] / metrics[-1]["step"]
    top = axes.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda tokens: tokens / per_step))
    top.xaxis.set_major_formatter(lambda tokens, _: human(tokens))
    top.set_xlabel("tokens")


def plot_expert_load(loads: Mapping[str, Sequence[int]], path: Path, metrics: Sequence[dict] = ()) -> None:
    """Draw each expert's share of its layer's tokens, and how uneven each layer was in each step, as heat maps.

    Args:
        loads: tokens of each expert by name of the router (``layers.3.mlp.gate``).
        path: file to write.
        metrics: lines of ``metrics.jsonl``; without them there is the first map alone.
    """
    import numpy
    from matplotlib.figure import Figure

    names = sorted(loads, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])
    counts = numpy.array([[int(count) for count in loads[name]] for name in names], dtype=float)
    relative = counts / numpy.maximum(counts.mean(axis=1, keepdims=True), 1.0)
    lines = [line for line in metrics if any(line.get(LOAD_PREFIX + name) for name in names)]
    height = 1.6 + 0.3 * len(names)
    figure = Figure(figsize=(8, height * (2 if lines else 1)), dpi=150, layout="constrained")
    axes, *below = figure.subplots(2 if lines else 1, squeeze=False)[:, 0]
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0.0, vmax=2.0, interpolation="nearest")
    axes.set_xlabel("routed expert")
    axes.set_title("tokens of an expert over the layer's mean (1 is even), last steps", fontsize=10)
    figure.colorbar(image, ax=axes)
    for other in below:
        uneven = numpy.array([[line.get(LOAD_PREFIX + name) or numpy.nan for line in lines] for name in names])
        edges = lines[0]["step"] - 0.5, lines[-1]["step"] + 0.5, len(names) - 0.5, -0.5
        image = other.imshow(uneven, aspect="auto", cmap="viridis", vmin=1.0, interpolation="nearest", extent=edges)
        other.set_xlabel("optimizer step")
        other.set_title("tokens of the busiest expert over the layer's mean", fontsize=10)
        figure.colorbar(image, ax=other)
    for each in (axes, *below):
        each.set_yticks(range(len(names)), [name.removesuffix(".mlp.gate") for name in names])
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path`` as a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def human(number: float) -> str:
    """``1234567`` as ``1.2M``."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000.0
    return f"{number:.3g}T"
