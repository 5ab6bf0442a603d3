"""metrics.jsonl, pictures, progress lines, the summary."""

from __future__ import annotations

import io
import json

import pytest

from r1mega.train.metrics import MetricsWriter, human, plot_expert_load, plot_loss, read_metrics, truncate
from r1mega.train.progress import ProgressPrinter, duration
from r1mega.train.summary import summary

PNG = b"\x89PNG\r\n"


def line(step: int, **more: float) -> dict:
    clock = {"step_seconds": 0.5, "tokens_per_second": 20.0}
    return {"step": step, "tokens": 10 * step, "loss": 4.0 / step, "grad_norm": 1.0, **clock, **more}


def write(folder, steps: range, last_step: int = 0) -> None:
    writer = MetricsWriter(folder, last_step)
    for step in steps:
        writer.write(line(step))
    writer.close()


def test_each_step_is_one_json_object(tmp_path):
    write(tmp_path, range(1, 4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text) for text in lines] == [line(1), line(2), line(3)]


def test_a_line_is_on_file_before_the_next_step(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(line(1))
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(1)]
    writer.close()


def test_resuming_drops_later_steps_and_a_line_that_was_cut_off(tmp_path):
    write(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "tok')
    write(tmp_path, range(4, 7), last_step=3)
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3, 4, 5, 6]


def test_truncating_keeps_the_bytes_of_what_stays(tmp_path):
    write(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines(keepends=True)
    truncate(path, 2)
    assert path.read_text() == "".join(before[:2])


def test_a_loss_that_is_not_a_number_is_null_and_the_line_still_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(line(1) | {"loss": float("nan"), "mtp_loss": float("inf")})
    writer.close()
    entry = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert entry["loss"] is None and entry["mtp_loss"] is None


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 4))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (step, pytest.approx(4.0 / step)) for step in (1, 2, 3)
    ]


def test_pictures_are_written_whole(tmp_path):
    lines = [line(step, mtp_loss=5.0 / step) for step in range(1, 20)]
    lines[9]["valid_loss"] = lines[18]["valid_loss"] = 3.0
    plot_loss(lines, tmp_path / "loss.png")
    loads = {"layers.1.mlp.gate": [3, 1], "layers.10.mlp.gate": [0, 0]}
    plot_expert_load(loads, tmp_path / "load.png")
    for entry in lines[5:]:
        entry |= {f"expert_load/{name}": 1.0 + entry["step"] for name in loads}
    plot_expert_load(loads, tmp_path / "steps.png", lines)
    for name in ("loss.png", "load.png", "steps.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load.png", "loss.png", "steps.png"]
    assert len((tmp_path / "steps.png").read_bytes()) > len((tmp_path / "load.png").read_bytes())


def test_a_run_without_steps_has_a_picture_too(tmp_path):
    plot_loss([], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_a_log_has_lines_for_the_first_and_the_last_step():
    log = io.StringIO()
    printer = ProgressPrinter(300, log, seconds_between_lines=3600)
    for step in range(1, 301):
        printer.step(line(step))
    assert log.getvalue().splitlines() == [
        "step   1/300  loss 4.0000  grad 1.000  20 tokens/s  2:30 left",
        "step 300/300  loss 0.0133  grad 1.000  20 tokens/s  0:00 left",
    ]


def test_a_terminal_is_updated_in_place():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    printer = ProgressPrinter(2, terminal)
    printer.step(line(1))
    printer.message("saved")
    printer.step(line(2))
    first, message, last = terminal.getvalue().split("\r")[1:]
    assert first.startswith("step 1/2") and not first.endswith("\n")
    assert message == "saved".ljust(len(first)) + "\n"
    assert last.startswith("step 2/2") and last.endswith("0:00 left\n")


@pytest.mark.parametrize("number, text", [(0, "0"), (950, "950"), (1234567, "1.23M"), (999_600, "1M"), (2e12, "2T")])
def test_numbers_for_people(number, text):
    assert human(number) == text


@pytest.mark.parametrize("seconds, text", [(0.2, "0:00"), (125, "2:05"), (3725.2, "1:02:05")])
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


def test_the_summary_says_how_it_went_and_where_things_lie(tmp_path):
    write(tmp_path, range(1, 5))
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    text = summary(tmp_path, "2 + 2 =", " 4\nand")
    for part in ("4 steps", "4.0000 -> 1.0000 (25%", "2 + 2 =| 4", "step_00000004", "metrics.jsonl", "tensorboard"):
        assert part in text
