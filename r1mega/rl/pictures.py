"""Pictures of a run of reinforcement learning: what was learned, and how the objective went.

Panels for which a run has no numbers are left out. Colours are Okabe and Ito's, which colour-blind people can tell
apart; lines that share a panel differ in their markers or dashes, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.train.metrics import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEARNING_PICTURE, OBJECTIVE_PICTURE = "learning.png", "objective.png"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
LINE: dict[str, Any] = {"linewidth": 1.3}
EVALUATED: dict[str, Any] = {"linewidth": 1.3, "markersize": 5}
CORRECT = "reward/accuracy"
_WINDOW = 0.05  # of the steps, for the running mean over rollouts
_MOST_IN_WINDOW = 101

Lines = Sequence[Mapping[str, Any]]
Panel = Callable[["Axes", Lines, Lines], bool]


def plot_run(metrics: Lines, records: Lines, folder: Path, correct: str = CORRECT) -> list[Path]:
    """Draw ``learning.png`` and ``objective.png`` into ``folder``.

    ``learning.png``: accuracy (pass@1, cons@k, greedy, and that of the rollouts), format, response length in tokens,
    reflection words. ``objective.png``: reward, its mean and its spread within groups; the share of groups whose
    rewards are all equal and teach nothing; KL divergence from the reference policy; entropy.

    Args:
        metrics: lines of ``metrics.jsonl``, one a step. Read where they are there: ``step``, ``correct``,
            ``reward/format``, ``response_length``, ``reflection_words``, ``reward``, ``reward_std``, ``flat_groups``,
            ``kl``, ``entropy``.
        records: evaluations: ``step``, ``pass@1``, ``cons@K`` for any K, ``greedy``, ``format``, ``response_length``,
            ``reflection_words``.
        folder: where to write.
        correct: the field of ``metrics`` that says how many answers are right.

    Returns:
        The pictures that were written; one without any panel is not.
    """

    def accuracy(axes: Axes, metrics: Lines, records: Lines) -> bool:
        return _accuracy(axes, metrics, records, correct)

    pictures: dict[str, list[Panel]] = {
        LEARNING_PICTURE: [accuracy, _format, _length, _reflection],
        OBJECTIVE_PICTURE: [_reward, _flat_groups, _kl, _entropy],
    }
    paths = {folder / name: panels for name, panels in pictures.items()}
    return [path for path, panels in paths.items() if _draw(panels, metrics, records, path)]


def _draw(panels: Sequence[Panel], metrics: Lines, records: Lines, path: Path) -> bool:
    """One picture, two panels a row; whether there was anything to draw."""
    from matplotlib.figure import Figure

    figure = Figure(dpi=150, layout="constrained")
    # A panel is tried on axes of its own, so that the picture has no room for one that stays empty.
    trial = Figure().add_subplot()
    filled = [panel for panel in panels if panel(trial, metrics, records)]
    if not filled:
        return False
    columns = min(2, len(filled))
    rows = -(-len(filled) // columns)
    figure.set_size_inches(5.0 * columns, 3.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for axes, panel in zip(grid, filled, strict=False):
        panel(axes, metrics, records)
        _finish(axes)
    for axes in list(grid)[len(filled) :]:
        axes.remove()
    save_figure(figure, path)
    return True


def _finish(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.tick_params(labelbottom=True)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=8)


def _accuracy(axes: Axes, metrics: Lines, records: Lines, correct: str) -> bool:
    votes = sorted({name for record in records for name in record if name.startswith("cons@")})
    rows = [("pass@1", BLUE, "o", "-")]
    rows += [(name, ORANGE, marker, "--") for name, marker in zip(votes, "s^vD", strict=False)]
    rows += [("greedy", GREEN, "D", ":")]
    drawn = _rollouts(axes, metrics, correct, GREY)
    for name, colour, marker, dashes in rows:
        drawn |= _evaluations(axes, records, name, colour, marker, name, dashes)
    axes.set_title("correct answers", fontsize=10)
    axes.set_ylabel("share")
    axes.set_ylim(-0.02, 1.02)
    return drawn


def _format(axes: Axes, metrics: Lines, records: Lines) -> bool:
    drawn = _rollouts(axes, metrics, "reward/format", GREY)
    drawn |= _evaluations(axes, records, "format", BLUE, "o", "evaluation")
    axes.set_title("responses in the right format", fontsize=10)
    axes.set_ylabel("share")
    axes.set_ylim(-0.02, 1.02)
    return drawn


def _length(axes: Axes, metrics: Lines, records: Lines) -> bool:
    return _from_zero(axes, metrics, records, "response_length", "mean response length", "tokens")


def _reflection(axes: Axes, metrics: Lines, records: Lines) -> bool:
    return _from_zero(axes, metrics, records, "reflection_words", "reflection words (wait, check, ...)", "a response")


def _from_zero(axes: Axes, metrics: Lines, records: Lines, name: str, title: str, unit: str) -> bool:
    drawn = _rollouts(axes, metrics, name, GREY)
    drawn |= _evaluations(axes, records, name, BLUE, "o", "evaluation")
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.1 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)
    return drawn


def _reward(axes: Axes, metrics: Lines, records: Lines) -> bool:
    steps, means = _points(metrics, "reward")
    if not steps:
        return False
    spread = {line["step"]: line["reward_std"] for line in metrics if line.get("reward_std") is not None}
    axes.plot(steps, means, color=BLUE, label="mean", **LINE)
    banded = [(step, mean, spread[step]) for step, mean in zip(steps, means, strict=True) if step in spread]
    if banded:
        at, low, high = zip(*((step, mean - std, mean + std) for step, mean, std in banded), strict=True)
        label = "± standard deviation in a group"
        axes.fill_between(at, low, high, color=BLUE, alpha=0.2, linewidth=0, label=label)
    axes.set_title("reward of the rollouts", fontsize=10)
    axes.set_ylabel("reward")
    return True


def _flat_groups(axes: Axes, metrics: Lines, records: Lines) -> bool:
    drawn = _rollouts(axes, metrics, "flat_groups", BLUE)
    axes.set_title("groups whose rewards are all equal", fontsize=10)
    axes.set_ylabel("share")
    axes.set_ylim(-0.02, 1.02)
    return drawn


def _kl(axes: Axes, metrics: Lines, records: Lines) -> bool:
    drawn = _rollouts(axes, metrics, "kl", BLUE)
    axes.set_title("KL divergence from the reference policy", fontsize=10)
    axes.set_ylabel("nats per token")
    return drawn


def _entropy(axes: Axes, metrics: Lines, records: Lines) -> bool:
    drawn = _rollouts(axes, metrics, "entropy", BLUE)
    axes.set_title("entropy of the policy", fontsize=10)
    axes.set_ylabel("nats per token")
    axes.set_ylim(bottom=0)
    return drawn


def _rollouts(axes: Axes, metrics: Lines, name: str, colour: str) -> bool:
    """Each step as it was, faint, and the mean over the steps around it; whether there are any."""
    steps, values = _points(metrics, name)
    if not steps:
        return False
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, running_mean(values), color=colour, label="rollouts (running mean)", **LINE)
    return True


def _evaluations(
    axes: Axes, records: Lines, name: str, colour: str, marker: str, label: str, dashes: str = "none"
) -> bool:
    steps, values = _points(records, name)
    if not steps:
        return False
    axes.plot(steps, values, color=colour, marker=marker, linestyle=dashes, label=label, **EVALUATED)
    return True


def _points(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """Steps and values, where there is one: JSON has null for what is not finite."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean over the twentieth of all values around each, over fewer at the ends."""
    half = min(round(len(values) * _WINDOW), _MOST_IN_WINDOW) // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
