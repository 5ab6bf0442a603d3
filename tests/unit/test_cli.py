"""The command line: help that teaches, one line for each mistake, and no torch before the settings are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega import cli
from r1mega.config import Config, ConfigError
from r1mega.parallel_state import GROUP_NAMES, Layout
from r1mega.settings import check_name, parse_config, setting_types

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples/configs/r1_tiny.yaml"


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def error_line(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The line that ``r1mega <argv>`` prints when it fails as a user's mistake should, without its prefix."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    prefix = "r1mega: error: "
    assert err.startswith(prefix)
    return err.removeprefix(prefix).rstrip("\n")


def help_text(capsys: pytest.CaptureFixture[str], command: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


# Reading settings


def test_flags_after_a_config_file_win_over_it() -> None:
    config = parse_config(
        ["--config", str(TINY), "--parallel.tp", "2", "--train.num_steps=50", "--train.dtype", "float64"]
    )
    assert (config.parallel.tp, config.train.num_steps, config.train.dtype) == (2, 50, "float64")
    assert config.model == parse_config(["--config", str(TINY)]).model


def test_a_later_config_file_wins_where_it_says_something(tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("model:\n  moe:\n    top_k: 2\n")
    config, tiny = parse_config([f"--config={TINY}", f"--config={later}"]), parse_config([f"--config={TINY}"])
    assert config.model.moe.top_k == 2
    assert config.model.moe.num_experts == tiny.model.moe.num_experts == 16


def test_no_settings_are_the_defaults() -> None:
    assert parse_config([]) == Config()


def test_lists_and_nulls_are_written_as_in_yaml() -> None:
    config = parse_config(['--data.train=["0.7", "a", "0.3", "b"]', "--model.attention.q_lora_rank=null"])
    assert config.data.train == ["0.7", "a", "0.3", "b"]
    assert config.model.attention.q_lora_rank is None


def test_numbers_may_be_in_scientific_notation_with_and_without_a_point(tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text("optimizer:\n  learning_rate: 1e-3\n  min_learning_rate: 1.0e-4\n")
    config = parse_config([f"--config={path}", "--optimizer.eps=1e-9"])
    assert (config.optimizer.learning_rate, config.optimizer.min_learning_rate, config.optimizer.eps) == (
        1e-3,
        1e-4,
        1e-9,
    )


# Mistakes


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--model.hiden_size", "3"], "unknown setting model.hiden_size; did you mean model.hidden_size?"),
        (["--train.num-steps=3"], "unknown setting train.num-steps; did you mean train.num_steps?"),
        (["--train.num", "3"], "unknown setting train.num; did you mean train.num_steps?"),
        (["--tp", "2"], "unknown setting tp; did you mean parallel.tp?"),
        (["--train.learning_rate=1"], "unknown setting train.learning_rate; did you mean optimizer.learning_rate?"),
        (["--train.lr", "5"], "unknown setting train.lr; did you mean optimizer.learning_rate?"),
        (["--lr", "5"], "unknown setting lr; did you mean optimizer.learning_rate?"),
        (["--train.gbs", "5"], "unknown setting train.gbs; did you mean train.global_batch_size?"),
        (
            ["--parallel.zzz", "3"],
            "unknown setting parallel.zzz; "
            "parallel has tp, pp, cp, ep, etp, schedule, recompute, chunks, memory_limit, placement",
        ),
        (
            ["--foo.bar", "3"],
            "unknown setting foo.bar; settings begin with model, parallel, data, optimizer, train or rl; see r1mega "
            "pretrain --help",
        ),
        (["17"], "unexpected argument 17; see r1mega pretrain --help"),
        (["--zzz"], "unknown setting zzz; see r1mega pretrain --help"),
        (
            ["--parallel", "2"],
            "parallel: is a group of settings; give them one by one (--parallel.tp) or in a --config FILE",
        ),
        (["--print_config"], "unknown setting print_config; see r1mega pretrain --help"),
        (["--model.hidden_size=a\nb"], "model.hidden_size=a b: must be an integer"),
        (["--a\nb"], "unknown setting a b; see r1mega pretrain --help"),
        (["stray"], "unexpected argument stray; see r1mega pretrain --help"),
        (["--model.hidden_size", "wide"], "model.hidden_size=wide: must be an integer"),
        (["--model.hidden_size=1.5"], "model.hidden_size=1.5: must be an integer"),
        (["--model.hidden_size"], "model.hidden_size: needs a value; must be an integer"),
        (["--optimizer.eps=small"], "optimizer.eps=small: must be a number"),
        (["--model.moe.capacity_factor=x"], "model.moe.capacity_factor=x: must be a number, or null"),
        (["--train.resume=perhaps"], "train.resume=perhaps: must be true or false"),
        (["--train.dtype=fp8"], "train.dtype=fp8: must be float32, bfloat16 or float64"),
        (["--train.seed=null"], "train.seed=null: must be an integer"),
        (["--data.train=corpus"], 'data.train=corpus: must be a list, such as ["first","second"]'),
        (
            ["--model.moe.num_experts=4", "--model.moe.top_k=9"],
            "model.moe.top_k=9: must be at most 4, the experts in the kept groups",
        ),
        (["--parallel.tp=2"], "parallel.tp=2: must divide the number of processes, 1"),
        (["--config"], "config: needs the path of a YAML file, as in --config examples/configs/r1_tiny.yaml"),
        (
            ["--config", "nowhere.yaml"],
            "config=nowhere.yaml: No such file or directory; must be a YAML file of settings",
        ),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(
    capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    assert error_line(capsys, ["pretrain", *flags]).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {hiden_size: 3}", "unknown setting model.hiden_size; did you mean model.hidden_size?"),
        ("modle: {hidden_size: 3}", "unknown setting modle; did you mean model?"),
        ("hidden_size: 3", "unknown setting hidden_size; did you mean model.hidden_size?"),
        (
            "model: {attention: {rope: {tetha: 1}}}",
            "unknown setting model.attention.rope.tetha; did you mean model.attention.rope.theta?",
        ),
        ("model: 3", "model=3: is a group of settings, not a setting; see FILE"),
        ("train:", "train=null: is a group of settings, not a setting; see FILE"),
        ("train: {num_steps: many}", "train.num_steps=many: must be an integer"),
        ("train: {output_dir: 5}", "train.output_dir=5: must be text"),
        ("train: [1,\n b", "config=FILE: is not valid YAML in line 2, column 3: "),
        (
            "train: {seed: 1}\ntrain: {num_steps: 2}",
            "config=FILE: is not valid YAML in line 2, column 1: train is given twice",
        ),
        ("", "config=FILE: must hold settings by group"),
        ("- 1", "config=FILE: must hold settings by group"),
        (b"\xff\xfe\x00", "config=FILE: is not UTF-8 text"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | bytes, line: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = error_line(capsys, ["pretrain", "--config", str(path)])
    assert found.replace(str(path), "FILE").startswith(line)


def test_every_setting_without_its_last_letter_is_found_again() -> None:
    last_parts = {name.split(".")[-1] for name in setting_types()}
    for name in setting_types():
        cut = name[:-1]
        if cut.split(".")[-1] in last_parts:
            continue  # optimizer.eps becomes optimizer.ep, which rather means parallel.ep
        with pytest.raises(ConfigError, match=f"^unknown setting {cut}; did you mean {cut}.\\?$"):
            check_name(cut)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["layout", "--world-size", "16"], "unknown setting world-size; did you mean --world_size?"),
        (["layout", "--worldsize=16"], "unknown setting worldsize; did you mean --world_size?"),
        (["grpo", "--presets", "r1_zero"], "unknown setting presets; did you mean --preset?"),
        (["model", "--confg", "x.yaml"], "unknown setting confg; did you mean --config?"),
    ],
)
def test_a_misspelt_option_of_a_command_is_found_again(
    capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    assert error_line(capsys, argv) == line


def test_the_examples_point_to_a_help_that_lists_settings() -> None:
    with pytest.raises(ConfigError, match="^unexpected argument 17; see r1mega pretrain --help$"):
        parse_config(["17"])


def test_more_stages_than_layers_is_said_in_the_users_terms() -> None:
    from r1mega.train.schedule import check_pipeline

    config = parse_config([f"--config={TINY}", "--parallel.pp=9", "--train.global_batch_size=36"])
    with pytest.raises(ConfigError) as caught:
        check_pipeline(config, 9)
    assert str(caught.value) == (
        "parallel.pp=9: makes 9 pipeline stages with parallel.schedule=1f1b, more stages than layers: "
        "model.num_layers (4) and model.num_mtp_layers (1) make 5; use at most 5"
    )


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    known = "pretrain, sft, grpo, layout, model, export, simulate, kernels"
    assert error_line(capsys, ["pretain"]) == f"unknown command pretain; must be one of {known}"


@pytest.mark.parametrize("argv", [["export"], ["export", "run"], ["layout"], ["layout", "--world_size", "x"]])
def test_commands_say_in_one_line_what_they_need(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    error_line(capsys, argv)


def test_export_of_a_folder_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = error_line(capsys, ["export", str(tmp_path / "none"), str(tmp_path / "out")])
    assert found == f"RUN={tmp_path / 'none'}: must be the folder of a run (its train.output_dir)"


def test_a_world_size_that_is_no_number_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert error_line(capsys, ["pretrain"]) == "WORLD_SIZE=four: must be a positive integer"


def test_the_layout_is_checked_for_the_processes_that_torchrun_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert "number of processes, 6" in error_line(capsys, ["pretrain", "--parallel.pp=4"])


def test_rank_0_speaks_first_and_another_rank_only_if_it_outlives_the_wait(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        assert capsys.readouterr().err == ""

    monkeypatch.setattr(cli.time, "sleep", sleep)
    assert error_line(capsys, ["pretrain", "--tp=2"]) == "unknown setting tp; did you mean parallel.tp? (rank 3)"
    assert waited == [cli.SECONDS_FOR_FIRST_RANK]


# Help


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_a_command_has_a_purpose_and_two_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    text = help_text(capsys, command)
    examples = text.split("examples:\n")[1].split("\n\n")[0].splitlines()
    assert sum(f"r1mega {command} " in line for line in examples) >= 2
    assert "``" not in text


def test_help_of_grpo_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "grpo")
    for name in setting_types():
        assert f"  --{name}" in text
    assert "--model CONFIG" not in text


def test_help_of_pretrain_describes_every_setting_but_those_of_rl(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "pretrain")
    for name in setting_types():
        assert (f"  --{name}" in text) == (not name.startswith("rl."))


@pytest.mark.parametrize(("command", "group"), [("layout", "parallel"), ("model", "model")])
def test_help_of_other_commands_lists_their_settings_only(
    capsys: pytest.CaptureFixture[str], command: str, group: str
) -> None:
    listed = {line.split()[0] for line in help_text(capsys, command).splitlines() if line.startswith("  --")}
    settings = {f"--{name}" for name in setting_types()}
    assert listed & settings == {name for name in settings if name.startswith(f"--{group}.")}


def test_only_the_first_rank_prints_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert help_text(capsys, "pretrain") == ""


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)


# layout


def test_layout_as_json_is_the_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layout", "--world_size=16", "--parallel.tp=2", "--parallel.ep=4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layout = Layout(16, tp=2, ep=4)
    assert found["world_size"] == 16
    assert found["sizes"] == {"tp": 2, "cp": 1, "dp": 8, "pp": 1, "etp": 1, "ep": 4, "edp": 4}
    assert found["groups"] == {name: layout.groups(name) for name in GROUP_NAMES}
    assert found["ranks"] == [{"rank": rank, **layout.coordinates(rank)} for rank in range(16)]


def test_layout_as_a_table_has_a_row_a_rank_and_a_line_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layout", "--world_size", "8", "--parallel.pp", "2", "--parallel.ep", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line.split() for line in lines if line.startswith("  rank"))
    assert header == ["rank", "tp", "cp", "dp", "pp", "etp", "ep", "edp"]
    assert next(line.split() for line in lines if line.startswith("     5 ")) == [
        "5",
        "0",
        "0",
        "1",
        "1",
        "0",
        "1",
        "0",
    ]
    assert "pp        4 groups of 2: [0 4] [1 5] [2 6] [3 7]" in lines
    assert "tp        8 groups of 1: each rank alone" in lines


def test_layout_of_2048_ranks_breaks_lines_between_groups_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layout", "--world_size", "2048", "--parallel.pp", "16", "--parallel.ep", "64"]) == 0
    groups = capsys.readouterr().out.split("\n\n")[2]
    assert "[0 128 256 ... 1920]" in groups
    for line in groups.splitlines():
        assert line.count("[") == line.count("]") and len(line) <= 116 and line.isascii()


def test_layout_reads_the_parallel_part_of_a_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "examples/configs/r1_671b.yaml")
    assert cli.main(["layout", "--world_size=2048", "--config", config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sizes"]["edp"] == 2


# Processes


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, check=False)


def test_parsing_and_checking_settings_does_not_import_torch() -> None:
    code = (
        "import sys, r1mega; from r1mega.settings import parse_config; import r1mega.cli;"
        f"parse_config(['--config', {str(TINY)!r}]).validate(4);"
        "assert r1mega.cli.main(['layout', '--world_size', '2']) == 0;"
        "assert r1mega.cli.main(['pretrain', '--tp', '2']) == 2;"
        "heavy = {'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_as_a_program_without_a_warning() -> None:
    done = run_python("-m", "r1mega", "layout", "--world_size", "4", "--parallel.tp", "8")
    assert done.returncode == 2
    assert done.stderr.startswith("r1mega: error: parallel.tp=8: must divide the number of processes, 4")
    assert done.stderr.count("\n") == 1
    assert run_python("-m", "r1mega", "layout", "--world_size", "4").stderr == ""
