"""The bubble benchmark without processes: what it refuses, what it prints, what its stages and its counter note."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from benchmarks.pipeline_bubble import bytes_off, parse_arguments, points, table, verdict
from benchmarks.pipeline_stages import Clock, GatedStage, Recorder, SleepingStage, rates
from benchmarks.saved_bytes import SavedBytes
from r1mega.pipeline.actions import Action, Table
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.pipeline.schedules import SCHEDULES
from r1mega.pipeline.simulator import Simulation, Span


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--schedules", "zbw"], "--schedules zbw: there is no schedule 'zbw'; did you mean zbv?"),
        (["--ranks", "1"], "--ranks=1: a pipeline has a bubble from 2 ranks on"),
        (["--microbatches", "0"], "--microbatches=0: must be 1 or more"),
        (["--num_warmup", "0"], "--num_warmup=0: must be 1 or more"),
        (["--milliseconds", "40", "0", "40"], "must be more than 0"),
        (["--output", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_arguments_that_cannot_run_are_refused_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(argv)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_by_default_every_schedule_is_measured():
    assert parse_arguments([]).schedules == list(SCHEDULES)


BUBBLE = {"bubble_rate": 0.25, "bubble_rate_makespan": 0.25}
RESULTS = {
    "sleeping": {
        "zbv": {
            "simulated": BUBBLE,
            "r1mega": {"bubble_rate": 0.26, "bubble_rate_of_steps": [0.255, 0.27]},
            "torch": {"bubble_rate": 0.28, "bubble_rate_of_steps": [0.28], "simulated": {"bubble_rate": 0.21}},
        },
        "v-min": {"simulated": BUBBLE, "r1mega": {"bubble_rate": 0.27, "bubble_rate_of_steps": [0.27]}},
    },
    "counted": {
        "zbv": {"simulated_peak_activations": [4.0, 4.0], "simulated_peak_bytes": [2**21] * 2,
                "peak_bytes": [2**21, 2**21 * 1.1]},
    },
}  # fmt: skip


def test_the_table_has_a_line_a_schedule_and_says_what_is_missing():
    results = copy.deepcopy(RESULTS)
    results["counted"]["v-min"] = results["counted"]["zbv"]
    head, zbv, v_min = table(results).splitlines()
    assert head.split()[:3] == ["schedule", "simulated", "measured"]
    assert " ".join(zbv.split()) == "zbv 25.00% 26.00% (25.5-27.0) +1.00 28.00% +7.00 4.00 2.0 2.0 2.0 2.2 +10.0%"
    assert " ".join(v_min.split()).startswith("v-min 25.00% 27.00% (27.0-27.0) +2.00 - - ")


def test_each_side_is_held_against_its_own_table():
    line = RESULTS["sleeping"]["zbv"]
    assert points(line["r1mega"], line["simulated"]) == pytest.approx(1.0)
    assert points(line["torch"], line["torch"]["simulated"]) == pytest.approx(7.0)
    assert bytes_off(RESULTS["counted"]["zbv"]) == pytest.approx(0.1)
    assert [sentence.split(" are ")[0] for sentence in verdict(RESULTS)] == [
        "1 of 2 bubbles",
        "1 of the 1 that torch has, too,",
        "0 of 1 peaks",
    ]


def test_rates_are_those_of_the_simulator():
    spans = [[Span(Action.parse("0F0"), 0.0, 1.0)], [Span(Action.parse("1F0"), 1.0, 4.0)]]
    found = rates([Simulation(Table([], []), spans)])
    assert found["bubble_rate"] == pytest.approx(1 - 2 / 3)
    assert found["bubble_rate_makespan"] == pytest.approx(1 - 2 / 4)
    assert found["mean_seconds"] == {"F": 2.0}


ONE_RANK = "0F0,0F1,0B0,0I1,0W1,0R\n"


def noted(stage_of, csv: str = ONE_RANK) -> list[str]:
    """The actions that the stage notes when one rank runs ``csv``."""
    recorder = Recorder(Clock(torch.device("cpu")))
    executor = PipelineExecutor(Table.from_csv(csv), {0: stage_of(recorder)}, None)
    executor.run([(i, torch.randn(2, 4)) for i in range(2)])
    spans = recorder.take()
    assert all(span.start <= span.end for span in spans)
    return [str(span.cell) for span in spans]


def test_a_sleeping_stage_notes_the_halves_of_a_backward():
    assert noted(lambda recorder: SleepingStage(0, True, (0, 0, 0), 4, recorder)) == [
        "0F0", "0F1", "0I0", "0W0", "0I1", "0W1",
    ]  # fmt: skip


def test_a_computing_stage_notes_whole_and_split_backwards():
    assert noted(lambda recorder: GatedStage(0, True, 2, 4, 8, recorder)) == ["0F0", "0F1", "0B0", "0I1", "0W1"]


def test_saved_bytes_are_counted_once_and_while_they_live():
    saved = SavedBytes()
    weight = torch.nn.Parameter(torch.ones(10))
    x = torch.ones(10)
    with saved.counting():
        y = (x * weight) + (x.view(2, 5) * 2 * weight.view(2, 5)).view(10)
    assert saved.live == 80  # x once, x * 2; no parameter
    del y
    assert saved.live == 40  # x is held by its name
    del x
    assert (saved.live, saved.peak) == (0, 80)


def test_weight_gradients_that_wait_count():
    recorder = Recorder(Clock(torch.device("cpu")))
    stage = GatedStage(0, True, 1, 4, 8, recorder)
    executor = PipelineExecutor(Table.from_csv("0F0,0I0,0W0,0R\n"), {0: stage}, None)
    held = []
    run = executor.weight_gradients.run
    saved = SavedBytes()
    executor.weight_gradients.run = lambda *key: (held.append(saved.live), run(*key))
    with saved.counting(executor.weight_gradients):
        executor.run([(0, torch.randn(2, 4))])
    assert held[0] >= 4 * 2 * (2 * 4 + 3 * 8)  # the norm's output, the gradient; gate, up and their product
    assert saved.live == 0


def test_the_picture_is_drawn_whole(tmp_path: Path):
    from benchmarks.bubble_chart import draw

    settings = {"ranks": 2, "microbatches": 4, "milliseconds": [40.0, 40.0, 40.0], "computing_ranks": 2}
    about = {"settings": settings, "machine": "a machine", "versions": {"torch": "2"}}
    draw(about | copy.deepcopy(RESULTS) | {"computing": {"zbv": RESULTS["sleeping"]["zbv"]}}, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
