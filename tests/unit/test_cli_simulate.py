"""``r1mega simulate``: what it prints and writes, one line for each mistake, and no torch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega import cli
from r1mega.pipeline.schedules import SCHEDULES, make_table
from r1mega.simulate_command import MOST_PAIRS

EXAMPLE = [
    "--schedule", "zb-h1", "--ranks", "8", "--microbatches", "24", "--forward", "18.522",
    "--backward_input", "18.086", "--backward_weight", "9.337", "--communication", "0.601",
]  # fmt: skip
SMALL = ["--ranks", "2", "--microbatches", "4"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["simulate", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    return json.loads(output(capsys, *arguments, "--json"))


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["simulate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("r1mega: error: ")
    return err.removeprefix("r1mega: error: ").rstrip("\n")


# What it prints


def test_the_example_of_the_help_prints_the_paper_s_figures_and_draws_the_timeline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = output(capsys, *EXAMPLE).splitlines()
    assert lines[0] == "zb-h1: 8 ranks, 8 stages, 24 microbatches"
    assert lines[2].split()[:7] == ["bubble", "rate", "by", "the", "longest", "rank", "15.85%"]
    assert lines[3].split()[:7] == ["bubble", "rate", "by", "the", "whole", "pipeline", "15.85%"]
    assert lines[4].split()[:2] == ["makespan", "1,310.41"]
    assert lines[5].split()[:3] == ["peak", "activations", "8"]
    assert lines[6].split()[:2] == ["weights", "1"]
    timeline = lines[lines.index(next(line for line in lines if line.startswith("rank"))) + 1 :][:8]
    assert [line.split()[0] for line in timeline] == [str(rank) for rank in range(8)]
    assert {len(line) for line in timeline} == {99}


def test_json_has_rates_makespan_and_what_each_rank_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, *EXAMPLE)
    assert round(found["bubble_rate"], 4) == round(found["bubble_rate_makespan"], 4) == 0.1585
    assert found["makespan"] == pytest.approx(1310.41, abs=0.01)
    assert found["peak_activations"] == [8] * 8
    assert found["weights"] == [1] * 8
    assert found["stage_to_rank"] == list(range(8))


def test_a_cost_is_that_of_a_rank_whatever_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1f1b", "zbv", "dualpipe"):
        found = figures(capsys, "--schedule", name, "--ranks", "4", "--microbatches", "8", "--forward", "3")
        assert found["busy"] == pytest.approx([8 * 5] * 4)
    assert found["weights"] == [2] * 4


def test_chunks_are_stages_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--schedule", "interleaved", *SMALL, "--chunks", "3")
    assert found["stages"] == 6 and found["busy"] == pytest.approx([12, 12])


def test_costs_by_stage_show_an_uneven_model(capsys: pytest.CaptureFixture[str]) -> None:
    even = figures(capsys, "--schedule", "1f1b", *SMALL)
    uneven = figures(capsys, "--schedule", "1f1b", *SMALL, "--forward", "1,3", "--backward_input", "2,2")
    assert uneven["busy"] == [4 * (1 + 2 + 1), 4 * (3 + 2 + 1)]
    assert uneven["bubble_rate"] > even["bubble_rate"]
    four = figures(capsys, "--schedule", "1f1b", *SMALL, "--forward", "0.5,0.5,1,2", "--backward_input", "2")
    assert four["busy"] == pytest.approx(uneven["busy"])


def test_recompute_costs_a_forward_more_and_holds_less(capsys: pytest.CaptureFixture[str]) -> None:
    plain, again = (figures(capsys, "--schedule", "gpipe", *SMALL, *more) for more in ([], ["--recompute"]))
    assert again["busy"] == [4 * 4] * 2 and plain["busy"] == [4 * 3] * 2
    assert again["peak_activations"] == [1, 1] and plain["peak_activations"] == [4, 4]


def test_an_overlap_may_be_faster_than_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--schedule", "dualpipe", "--ranks", "4", "--microbatches", "8"]
    plain, faster = (figures(capsys, *size, "--overlap", factor)["makespan"] for factor in ("1", "0.8"))
    assert faster < plain


def test_help_teaches_with_examples_that_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["simulate", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for name in [*SCHEDULES, "auto", "--compare", "--memory_limit"]:
        assert name in text
    lines = text.replace("\\\n", " ").splitlines()
    (tmp_path / "mine.csv").write_text("\n".join(line.strip() for line in lines if line.strip().endswith("R")))
    commands = [line.split()[2:] for line in lines if line.startswith("  r1mega simulate")]
    assert len(commands) == 4
    for command in commands:
        files = {
            name: str(tmp_path / name) for name in command if "." in name and name[0].isalnum() and name[-1] in "gnv"
        }
        output(capsys, *(files.get(word, word) for word in command))
    assert (tmp_path / "all.png").exists() and (tmp_path / "mine.json").exists()


# Comparisons


def test_compare_shows_every_schedule_and_why_some_cannot_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = [f"--png={tmp_path / 'all.png'}", f"--trace={tmp_path / 'all.json'}"]
    uneven = ["--chunks", "3", "--forward", "1,1,1,1"]
    lines = output(capsys, "--compare", *SMALL, *uneven, *files).splitlines()
    assert {line.split()[0] for line in lines[1 : 1 + len(SCHEDULES)]} == set(SCHEDULES)
    reason = "costs for 4 stages cannot be cut into 6 stages"
    assert [line.split(maxsplit=1) for line in lines if "cannot run" in line] == [
        ["interleaved", f"cannot run: {reason}"], ["looped-bfs", f"cannot run: {reason}"]
    ]  # fmt: skip
    assert lines[-2:] == [f"wrote {tmp_path / 'all.png'}", f"wrote {tmp_path / 'all.json'}"]
    assert (tmp_path / "all.png").read_bytes().startswith(PNG)
    events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == set(SCHEDULES) - {"interleaved", "looped-bfs"}


def test_compare_as_json_is_sorted_by_makespan(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--compare", "--ranks", "3", "--microbatches", "6")
    makespans = [schedule["makespan"] for schedule in found["schedules"]]
    assert makespans == sorted(makespans) and makespans[0] < makespans[-1]
    assert len(makespans) == len(SCHEDULES) and found["refused"] == {}


def test_compare_gives_chunks_to_those_that_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--compare", *SMALL, "--chunks", "3")
    stages = {schedule["schedule"]: schedule["stages"] for schedule in found["schedules"]}
    assert (stages["interleaved"], stages["1f1b"], stages["zbv"]) == (6, 2, 4)


def test_compare_says_where_costs_by_stage_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--compare", *SMALL, "--chunks", "3", "--forward", "1,1,1,1")
    assert found["refused"] == {
        name: "costs for 4 stages cannot be cut into 6 stages" for name in ("interleaved", "looped-bfs")
    }


def test_a_table_may_be_called_like_a_schedule_and_may_not_fit_the_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "zbv"
    path.write_text("0F0,0B0,0R\n")
    found = figures(capsys, "--compare", "--table", str(path))
    assert {"zbv", "zbv (table)"} <= {schedule["schedule"] for schedule in found["schedules"]}
    path.write_text(make_table("1f1b", 3, 3).to_csv())
    assert error(capsys, "--table", str(path), "--forward", "1,1") == "costs for 2 stages cannot be cut into 3 stages"


def test_compare_takes_a_table_of_one_s_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "1f1b.csv"
    path.write_text(make_table("1f1b", 2, 4).to_csv())
    found = figures(capsys, "--compare", "--table", str(path))
    by_name = {schedule["schedule"]: schedule for schedule in found["schedules"]}
    assert by_name["1f1b.csv"]["makespan"] == by_name["1f1b"]["makespan"]
    assert len(by_name) == len(SCHEDULES) + 1


# auto


def test_auto_keeps_to_the_memory_limit_and_says_how_good_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--schedule", "auto", *SMALL, "--memory_limit", "2"]
    found = figures(capsys, *arguments)
    assert found["makespan"] <= figures(capsys, "--schedule", "zbv", *SMALL)["makespan"]
    assert max(found["peak_activations"]) <= 2
    assert found["auto"]["lower_bound"] <= found["makespan"]
    assert max(found["auto"]["peak_memory"]) <= found["auto"]["memory_limit"] == 2
    assert output(capsys, *arguments).splitlines()[-1].startswith("auto: makespan ")


def test_auto_says_what_it_is_compared_with_and_what_its_limit_counts(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--schedule", "auto", *SMALL)
    assert "DualPipe, with two, is not among them" in text
    assert "limit: 2, and 2 are needed, counted as in the Zero Bubble paper: a forward adds 1" in text
    assert "peak activations count until the weight gradient" in text and "overlap" not in text
    assert "overlap: no search makes any" in output(capsys, "--schedule", "auto", *SMALL, "--overlap", "0.8")
    assert "DualPipe" not in output(capsys, "--schedule", "zbv", *SMALL)


def test_a_comparison_with_a_memory_limit_shows_what_is_over_it_and_what_has_two_copies(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--compare", "--ranks", "4", "--microbatches", "8", "--memory_limit", "4"]
    found = {each["schedule"]: each["not_compared_with_auto"] for each in figures(capsys, *arguments)["schedules"]}
    assert found["gpipe"] == found["zb-h2"] == "over"
    assert found["1f1b"] == found["zb-h1"] == found["zbv"] == found["auto"] == ""
    assert found["dualpipe"] == "over, 2 copies"
    lines = {line.split()[0]: line for line in output(capsys, *arguments).splitlines() if line}
    assert "limit" in lines["schedule"] and " over, 2 copies " in lines["dualpipe"] and " over " in lines["gpipe"]
    assert " within " in lines["zbv"]


def test_auto_joins_a_comparison_that_has_a_memory_limit(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--compare", *SMALL, "--memory_limit", "2")
    assert "auto" in [schedule["schedule"] for schedule in found["schedules"]]
    assert "auto" not in figures(capsys, "--compare", *SMALL)


# Files


def test_a_table_from_a_file_is_what_csv_wrote(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "zbv.csv"
    first = figures(capsys, "--schedule", "zbv", *SMALL, "--csv", str(path))
    second = figures(capsys, "--table", str(path))
    assert path.read_text() == make_table("zbv", 2, 4).to_csv()
    assert (first.pop("schedule"), second.pop("schedule")) == ("zbv", "zbv.csv")
    assert first == second


def test_a_table_may_have_idle_cells_blank_lines_at_its_end_and_a_byte_order_mark(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,,,0B0,0R\r\n,1F0,1B0,,1R\r\n\r\n\n", encoding="utf-8-sig")
    assert figures(capsys, "--table", str(path))["makespan"] == 6


def test_png_and_trace_are_written_whole_beside_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    png, trace = tmp_path / "a.png", tmp_path / "a.json"
    png.write_text("old")
    output(capsys, "--schedule", "1f1b", *SMALL, "--png", str(png), "--trace", str(trace))
    assert png.read_bytes().startswith(PNG)
    slices = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == sum(len(row) for row in csv.reader(make_table("1f1b", 2, 4).to_csv().splitlines()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_nothing_is_written_where_one_of_the_files_cannot_be(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--schedule", "1f1b", *SMALL, "--png", str(tmp_path / "a.png")]
    message = error(capsys, *arguments, "--trace", str(tmp_path / "no/a.json"))
    assert message == f"trace={tmp_path}/no/a.json: there is no folder {tmp_path}/no"
    message = error(capsys, *arguments, "--trace", str(tmp_path / "a.png"))
    assert message == f"trace={tmp_path}/a.png: is the file of png, too; must be another one"
    assert error(capsys, "--schedule", "1f1b", *SMALL, "--png", str(tmp_path)).endswith(
        "is no file; must be the path of one to write"
    )
    assert "is no file" in error(capsys, "--schedule", "1f1b", *SMALL, "--png", "/dev/null")
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_not_overwritten_by_a_picture_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0B0,0R\n")
    assert "is the file of table, too" in error(capsys, "--table", str(path), "--png", str(path))
    assert path.read_text() == "0F0,0B0,0R\n"


# Mistakes

MISTAKES = {
    "": "schedule: must be one of gpipe, 1f1b, ",
    "--schedule zbh1 --ranks 2 --microbatches 4": "did you mean zb-h1?",
    "--schedule aut --ranks 2 --microbatches 4": "there is no schedule 'aut'; did you mean auto? There are gpipe, ",
    "--schedule 1f1b --microbatches 4": "ranks: must be a number, as in --ranks 8",
    "--compare --ranks 2": "microbatches: must be a number, as in --microbatches 8",
    "--schedule 1f1b --ranks 0 --microbatches 4": "ranks=0: must be 1 or more",
    "--schedule 1f1b --ranks two --microbatches 4": "ranks=two: must be an integer",
    "--schedule interleaved --ranks 2 --microbatches 4 --chunks -1": "chunks=-1: must be 1 or more",
    "--schedule zb-h1 --ranks 2 --microbatches 4 --chunks 2": "a rank of zb-h1 holds 1 stage",
    "--schedule 1f1b --ranks 2 --microbatches 4 --forward x": "forward=x: must be a time of 0 or more, or a comma list",
    "--schedule 1f1b --ranks 2 --microbatches 4 --forward 1,": "forward=1,: must be a time",
    "--schedule 1f1b --ranks 2 --microbatches 4 --forward -1": "forward=-1: must be a time",
    "--schedule 1f1b --ranks 2 --microbatches 4 --backward_input nan": "backward_input=nan: must be a time",
    "--schedule 1f1b --ranks 2 --microbatches 4 --communication inf": "communication=inf: must be a number",
    "--schedule 1f1b --ranks 2 --microbatches 4 --forward 1,2,3": "costs for 3 stages cannot be cut into 2 stages",
    "--schedule 1f1b --ranks 2 --microbatches 4 --forward 1,2 --backward_weight 1,2,3": "same number of stages",
    "--schedule 1f1b --ranks 2 --microbatches 4 --forward 0 --backward_input 0 --backward_weight 0": "are all 0",
    "--schedule 1f1b --ranks 2 --microbatches 4 --forward 5e307": "are too large to be added up",
    "--schedule 1f1b --compare --ranks 2 --microbatches 4": "schedule=1f1b: compare shows every schedule; leave one",
    "--schedule 1f1b --table a.csv": "schedule=1f1b: table is one already; leave one of the two out",
    "--compare --ranks 2 --microbatches 4 --csv a.csv": "csv=a.csv: is for one schedule",
    "--schedule 1f1b --ranks 2 --microbatches 4 --memory_limit 3": "memory_limit=3: is for --schedule auto",
    "--schedule auto --ranks 2 --microbatches 4 --memory_limit 0.1": "memory_limit",
    "--schedule auto --ranks 2 --microbatches 4 --recompute": "recompute: auto does not know of it",
    "--schedule 1f1b --ranks 2 --microbatches 4 --colour red": "unexpected argument --colour",
    "--schedule 1f1b --ranks 1000 --microbatches 1000": f"too many to simulate; at most {MOST_PAIRS:,}",
    "--table no/such.csv": "table=no/such.csv: No such file or directory; must be a CSV file",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert MISTAKES[arguments] in error(capsys, *arguments.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "there is no microbatch"),
        ("hello,world\n", "rank 0: 'hello' is not an action"),
        ("0F0,0R\n", "rank 0, action 0B0: is missing"),
        ("0B0,0F0,0R\n", "rank 0, action 0B0: comes before 0F0"),
        ("0F0,0B0,0F1,0B1,0R\n1F1,1F0,1B0,1B1,1R\n", "deadlock: rank 0 waits in 0B0 for the gradients from stage 1"),
        ("0F0,0B0,0R\n2F0,2B0,2R\n", "no rank runs stage 1, but there is a stage 2; is a line missing?"),
        ("0F0,0B0,0R\n0F1,0B1\n", "rank 1, action 0F1: stage 0 runs on rank 0 already"),
        ("0F999999999,0B999999999,0R\n", "there is a microbatch 999999999, but there are 3 actions only"),
    ],
)
def test_a_table_that_cannot_run_is_refused_with_rank_action_and_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, reason: str
) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    assert error(capsys, "--table", str(path)).startswith(f"table={path}: ")
    assert reason in error(capsys, "--table", str(path))


def test_a_table_that_is_no_text_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert error(capsys, "--table", str(path)) == f"table={path}: is not UTF-8 text; must be a CSV file"


def test_ranks_and_microbatches_come_from_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(make_table("1f1b", 2, 4).to_csv())
    assert error(capsys, "--table", str(path), "--ranks", "3") == f"ranks=3: {path} has 2"
    assert figures(capsys, "--table", str(path), "--microbatches", "4")["microbatches"] == 4


def test_torch_is_not_imported() -> None:
    program = (
        "import sys; from r1mega.cli import main; "
        "status = main(['simulate', '--compare', '--ranks', '2', '--microbatches', '2', '--memory_limit', '2', "
        "'--png', '/dev/null/x']) + main(['simulate', '--schedule', 'auto', '--ranks', '2', '--microbatches', '2']); "
        "from r1mega.pipeline.timeline import picture, trace; "
        "sys.exit(f'{status} {[name for name in sys.modules if name.split(chr(46))[0] == \"torch\"][:3]}')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "2 []"
