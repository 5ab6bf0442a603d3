"""What a user of ``r1mega grpo`` can get wrong: one line that names the setting, its value and what fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from r1mega import cli
from r1mega.config import Config
from r1mega.rl import grpo as program
from r1mega.rl.grpo import check_settings
from r1mega.rl.tasks.addition import AdditionTask, write_addition
from r1mega.settings import dump_config, parse_config
from r1mega.train.checkpoint_files import first_difference
from r1mega.train.run_folder import check_folder

ROOT = Path(__file__).parents[2]
MODEL = ["--model.vocab_size=32", "--model.hidden_size=16", "--model.num_layers=2", "--model.max_position=64"]
MOE = ["--model.moe.num_experts=4", "--model.moe.top_k=2", "--model.moe.ffn_hidden_size=8"]
BATCH = ["--train.global_batch_size=16", "--train.microbatch_size=4", "--train.num_steps=8"]


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    task = AdditionTask(num_prompts=4, num_evaluation=2, num_demonstrations=1)
    return write_addition(tmp_path_factory.mktemp("grpo") / "data", task).folder


@pytest.fixture
def argv(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings that fit; flags behind them win."""

    def never(*arguments: object) -> int:
        raise AssertionError("a run was started")

    monkeypatch.setattr(program, "run_program", never)
    files = [f"--rl.prompts={data / 'prompts.jsonl'}", f"--rl.eval_prompts={data / 'evaluation.jsonl'}"]
    run = [f"--data.tokenizer={data}", f"--train.output_dir={tmp_path / 'run'}"]
    return ["grpo", *MODEL, *MOE, *BATCH, *files, *run, "--rl.max_new_tokens=8", "--rl.max_prompt_tokens=8"]


@pytest.fixture
def without_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards are not imported in a process of their own, which takes a second."""
    monkeypatch.setattr(program, "check_rewards", lambda options: None)


def error_line(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("r1mega: error: ")
    return err.removeprefix("r1mega: error: ").rstrip("\n")


def test_settings_that_fit_are_completed(argv, without_rewards) -> None:
    config = check_settings(parse_config([*argv[1:], "--parallel.tp=2", "--model.moe.bias_update_rate=0.1"]), 2)
    assert config.data.sequence_length == 16  # 8 + 8 - 1, a multiple of tp
    assert config.model.moe.bias_update_rate == 0.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rl.group_size=3"], "rl.group_size=3: must divide rl.minibatches x train.global_batch_size (16)"),
        (["--rl.group_size=32"], "rl.group_size=32: must divide rl.minibatches x train.global_batch_size (16)"),
        (["--rl.group_size=1"], "rl.group_size=1: must be 2 or more: a group compares its own"),
        (
            ["--rl.minibatches=3", "--rl.group_size=2"],
            "train.num_steps=8: must be a multiple of rl.minibatches (3), the steps of a rollout",
        ),
        (
            ["--rl.minibatches=2", "--rl.reference_interval=3"],
            "rl.reference_interval=3: must be a multiple of rl.minibatches (2), the steps of a rollout",
        ),
        (
            ["--rl.minibatches=2", "--rl.eval_interval=3"],
            "rl.eval_interval=3: must be a multiple of rl.minibatches (2), the steps of a rollout",
        ),
        (
            ["--rl.minibatches=2", "--train.checkpoint_interval=3"],
            "train.checkpoint_interval=3: must be a multiple of rl.minibatches (2), the steps of a rollout",
        ),
        (
            ["--model.moe.aux_loss_coefficient=0.1"],
            "model.moe.aux_loss_coefficient=0.1: must be 0 in RL: its objective is the only loss",
        ),
        (
            ["--model.moe.z_loss_coefficient=0.1"],
            "model.moe.z_loss_coefficient=0.1: must be 0 in RL: its objective is the only loss",
        ),
        (
            ["--model.moe.capacity_factor=1.0"],
            "model.moe.capacity_factor=1.0: must be null in RL: what is dropped would depend on what stands beside it",
        ),
        (
            ["--rl.max_new_tokens=57"],
            "rl.max_new_tokens=57: with rl.max_prompt_tokens (8) must be at most model.max_position (64)",
        ),
        (["--rl.reward.correct=code"], "rl.reward.correct=code: must be one of rl.reward.names (accuracy, format)"),
        (["--rl.prompts=null"], 'rl.prompts=null: name a JSONL file of {"prompt": ..., "reference": ...}'),
        (
            ["--data.tokenizer=null"],
            "data.tokenizer=null: name a tokenizer, or a model.checkpoint that has one",
        ),
        (["--data.tokenizer=/nowhere"], "data.tokenizer=/nowhere: there is no such file or folder"),
        (["--model.vocab_size=8"], "model.vocab_size=8: must be at least 21, the size of data.tokenizer (DATA)"),
        (["--rl.prompts=/nowhere"], "rl.prompts=/nowhere: cannot be read: No such file or directory"),
        (["--rl.eval_prompts=/nowhere"], "rl.eval_prompts=/nowhere: cannot be read: No such file or directory"),
        (
            ["--rl.max_prompt_tokens=5"],
            "rl.max_prompt_tokens=5: must be at least 6, the tokens of a prompt of rl.prompts ('PROMPT'...)",
        ),
        (
            ["--model.checkpoint=/nowhere"],
            "model.checkpoint=/nowhere: config.json: No such file or directory; must be a folder with a Hugging Face "
            "checkpoint",
        ),
        (["--parallel.ep=3"], "parallel.ep=3: must divide the number of processes, 1 / (pp=1 x etp=1) = 1; try 1"),
        (["--rl.temperature=0"], "rl.temperature=0.0: must be positive"),
        (["--rl.top_p=1.5"], "rl.top_p=1.5: must be over 0 and at most 1"),
        (["--rl.loss.kl_coefficient=-1"], "rl.loss.kl_coefficient=-1.0: must be at least 0"),
        (["--rl.reward.weights=[1]"], "rl.reward.weights=[1.0]: must be as many as rl.reward.names (2)"),
        (["--rl.overlong=drop"], "rl.overlong=drop: must be keep or mask"),
        (["--preset=r2"], "preset=r2: must be r1_zero"),
        (["--preset"], "preset=: must be r1_zero"),
    ],
)
def test_what_does_not_fit_is_one_line(capsys, argv, data, without_rewards, flags: list[str], message: str) -> None:
    found = error_line(capsys, [*argv, *flags])
    prompt = json.loads((data / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    assert found == message.replace("DATA", str(data)).replace("PROMPT", prompt)


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        (["--rl.reward.names=[accuracy,accurate]"], "rl.reward.names=accurate: must be accuracy, "),
        (["--rl.reward.names=[accuracy,no.such:thing]"], "rl.reward.names=no.such:thing: "),
        (['--rl.reward.arguments={"length": {}}'], "rl.reward.arguments=length: must be among "),
        (['--rl.reward.arguments={"format": {"no": 1}}'], "rl.reward.arguments.format"),
    ],
)
def test_a_reward_that_is_not_there_is_one_line_with_the_name_of_the_setting(capsys, argv, flags, start) -> None:
    assert error_line(capsys, [*argv, *flags]).startswith(start)


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("nonsense", ": not JSON (Expecting value: line 1 column 1 (char 0))"),
        ('{"reference": "1"}', ":2: prompt=null: must be text, and not empty"),
        ('{"prompt": "1+1="}', ":2: has no reference, which a reward needs"),
        ('{"prompt": "1+1=", "reference": 2}', ':2: reference=2: must be text ("7"), or null'),
        ("[]", ':2: must be an object, as in {"prompt": "What is 3 + 4?", "reference": "7"}'),
    ],
)
def test_a_bad_line_of_prompts_is_named(capsys, argv, tmp_path, without_rewards, line: str, end: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+1=", "reference": "2"}\n' + line + "\n")
    found = error_line(capsys, [*argv, f"--rl.eval_prompts={path}"])
    assert found.startswith(f"{path}:2") and found.endswith(end)


def test_a_prompt_without_a_token_is_named(capsys, argv, tmp_path, without_rewards, monkeypatch) -> None:
    from r1mega.data.tokenizer import HuggingFaceTokenizer

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", lambda self, text, bos=False: [])
    found = error_line(capsys, argv)
    assert "rl.prompts=" in found and "data.tokenizer makes no token of the prompt" in found


def test_fewer_prompts_than_data_parallel_ranks_is_one_line(capsys, argv, monkeypatch, without_rewards) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = error_line(capsys, [*argv, "--train.microbatch_size=1", "--rl.group_size=8"])
    expected = "x train.global_batch_size / rl.group_size are 2 prompts, fewer than data-parallel ranks (4)"
    assert found == f"rl.minibatches=1: {expected}"


def test_the_preset_is_r1_zeros_own_figures_and_fits_r1_on_2048_ranks(
    data, tmp_path, without_rewards, monkeypatch
) -> None:
    monkeypatch.setattr("r1mega.data.tokenizer_check.MOST_PADDING", 2**20)  # the tokenizer is a toy's
    settings = yaml.safe_load((ROOT / "examples/configs/r1_671b.yaml").read_text())
    model = tmp_path / "model.yaml"
    model.write_text(yaml.safe_dump({name: settings[name] for name in ("model", "parallel")}))
    flags = [*cli.with_preset(["--preset", "r1_zero"]), f"--config={model}", f"--data.tokenizer={data}"]
    flags += [f"--rl.prompts={data / 'prompts.jsonl'}", "--model.moe.aux_loss_coefficient=0"]
    config = check_settings(parse_config(flags), 2048)
    rl, train = config.rl, config.train
    assert (config.optimizer.learning_rate, rl.loss.kl_coefficient, rl.temperature) == (3e-6, 0.001, 1.0)
    assert (train.global_batch_size, rl.group_size, rl.minibatches) == (512, 16, 16)
    assert (train.num_steps, rl.reference_interval, rl.max_new_tokens) == (10_400, 400, 32_768)


def in_folder(config: Config, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))


def test_a_run_goes_on_with_longer_completions_or_another_tp_but_not_with_another_group_size(
    argv, tmp_path, without_rewards
) -> None:
    there = check_settings(parse_config(argv[1:]), 1)
    in_folder(there, tmp_path / "run")
    resume = ["--train.resume=true"]
    for flags in (["--rl.max_new_tokens=16"], ["--parallel.tp=2"]):
        here = check_settings(parse_config([*argv[1:], *resume, *flags]), 2)
        assert here.data.sequence_length != there.data.sequence_length
        assert check_folder(here) is None
    here = check_settings(parse_config([*argv[1:], *resume, "--rl.group_size=4"]), 1)
    assert first_difference(there.to_dict(), here.to_dict()) == ("rl.group_size", 8, 4)


def test_a_pretraining_run_is_another_run(argv, tmp_path, without_rewards) -> None:
    grpo = check_settings(parse_config(argv[1:]), 1)
    assert first_difference(Config(model=grpo.model).to_dict(), grpo.to_dict()) is not None
    flags = [*MODEL, *MOE, *BATCH, "--data.sequence_length=15", "--model.moe.bias_update_rate=0"]
    found = first_difference(parse_config(flags).to_dict(), grpo.to_dict())
    assert found is not None and found[0] == "rl.prompts"
