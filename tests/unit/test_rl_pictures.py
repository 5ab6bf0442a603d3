"""The pictures of a GRPO run: what is in them, and that a run with little to show has them, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from r1mega.rl import pictures
from r1mega.rl.pictures import plot_run, running_mean

PNG = b"\x89PNG\r\n"
STEPS = 40


def metrics(**changes: Any) -> list[dict]:
    lines = []
    for step in range(1, STEPS + 1):
        line = {"step": step, "reward": step / 30, "reward_std": 0.4, "reward/accuracy": step / 50}
        line |= {"reward/format": 0.9, "response_length": 20.0, "reflection_words": 0.1, "flat_groups": 0.2}
        lines.append(line | {"kl": 0.001 * step, "entropy": 1 / step} | changes)
    return lines


def records(**changes: Any) -> list[dict]:
    record = {"pass@1": 0.2, "cons@16": 0.5, "greedy": 0.9, "format": 0.8, "response_length": 21, "reflection_words": 0}
    return [{"step": step} | record | changes for step in (0, 20, 40)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that are saved, by the name of their file."""
    found: dict[str, Figure] = {}
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: found.update({path.name: figure}))
    return found


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def labels(figure: Figure, title: str) -> list[str]:
    (axes,) = (axes for axes in figure.axes if axes.get_title() == title)
    return axes.get_legend_handles_labels()[1]


def test_pictures_are_written_whole(tmp_path: Path) -> None:
    paths = plot_run(metrics(), records(), tmp_path)
    assert [path.name for path in paths] == ["learning.png", "objective.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learning.png", "objective.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_every_panel_has_its_unit_and_its_lines(figures: dict[str, Figure], tmp_path: Path) -> None:
    plot_run(metrics(), records(), tmp_path)
    learning, objective = figures["learning.png"], figures["objective.png"]
    assert titles(learning) == [
        "correct answers",
        "responses in the right format",
        "mean response length",
        "reflection words (wait, check, ...)",
    ]
    assert titles(objective) == [
        "reward of the rollouts",
        "groups whose rewards are all equal",
        "KL divergence from the reference policy",
        "entropy of the policy",
    ]
    assert [axes.get_ylabel() for axes in learning.axes] == ["share", "share", "tokens", "a response"]
    assert [axes.get_ylabel() for axes in objective.axes] == ["reward", "share", "nats per token", "nats per token"]
    assert {axes.get_xlabel() for axes in learning.axes + objective.axes} == {"optimizer step"}
    assert labels(learning, "correct answers") == ["rollouts (running mean)", "pass@1", "cons@16", "greedy"]
    assert labels(objective, "reward of the rollouts") == ["mean", "± standard deviation in a group"]


def test_lines_that_share_a_panel_differ_in_more_than_colour(figures: dict[str, Figure], tmp_path: Path) -> None:
    plot_run(metrics(), records(), tmp_path)
    lines = [line for line in figures["learning.png"].axes[0].lines if not line.get_label().startswith("_")]
    styles = [(line.get_marker(), line.get_linestyle()) for line in lines]
    assert len(set(styles)) == len(styles) == 4


def test_values_stand_at_their_steps(figures: dict[str, Figure], tmp_path: Path) -> None:
    plot_run(metrics(), records(), tmp_path)
    lines = {line.get_label(): line for line in figures["learning.png"].axes[0].lines}
    assert list(lines["cons@16"].get_xdata()) == [0, 20, 40] and set(lines["cons@16"].get_ydata()) == {0.5}
    assert list(lines["rollouts (running mean)"].get_xdata()) == list(range(1, STEPS + 1))
    assert lines["rollouts (running mean)"].get_ydata()[9] == pytest.approx(0.2)


def test_the_accuracy_may_have_another_name(figures: dict[str, Figure], tmp_path: Path) -> None:
    lines = [{"step": 1, "reward/tests": 0.25}, {"step": 2, "reward/tests": 0.5}]
    plot_run(lines, [], tmp_path, correct="reward/tests")
    assert titles(figures["learning.png"]) == ["correct answers"]


def test_panels_without_numbers_are_left_out(figures: dict[str, Figure], tmp_path: Path) -> None:
    paths = plot_run(metrics(kl=None, flat_groups=None, reward_std=None), records(), tmp_path)
    assert len(paths) == 2
    assert titles(figures["objective.png"]) == ["reward of the rollouts", "entropy of the policy"]
    assert labels(figures["objective.png"], "reward of the rollouts") == ["mean"]


def test_a_step_without_a_number_is_a_gap_and_no_error(figures: dict[str, Figure], tmp_path: Path) -> None:
    lines = metrics()
    lines[3]["kl"] = lines[4]["reward_std"] = None
    plot_run(lines, [], tmp_path)
    (axes,) = (axes for axes in figures["objective.png"].axes if axes.get_title().startswith("KL"))
    assert len(axes.lines[0].get_xdata()) == STEPS - 1


def test_a_run_without_numbers_has_no_picture(tmp_path: Path) -> None:
    assert plot_run([], [], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_evaluations_alone_are_drawn(tmp_path: Path) -> None:
    assert [path.name for path in plot_run([], records(), tmp_path)] == ["learning.png"]


def test_a_running_mean_keeps_a_line_and_shrinks_noise() -> None:
    straight = [float(i) for i in range(200)]
    assert running_mean(straight)[5:-5] == pytest.approx(straight[5:-5])
    noise = [(-1.0) ** i for i in range(200)]
    assert max(abs(value) for value in running_mean(noise)[5:-5]) < 0.2
    assert running_mean([3.0]) == [3.0] and running_mean([]) == []
