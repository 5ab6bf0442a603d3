"""Config: what each class and ``validate`` refuse, each in one line that names field, value and what fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from r1mega import config
from r1mega.config import Config, ConfigError, divisors
from r1mega.settings import dump_config, parse_config

CONFIGS = Path(__file__).parents[2] / "examples/configs"
MOE = ["--model.moe.num_experts=16", "--model.moe.top_k=4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.hidden_size=0"], "model.hidden_size=0: must be positive"),
        (["--model.first_dense_layers=9"], "model.first_dense_layers=9: must be between 0 and model.num_layers (4)"),
        (["--model.attention.qk_rope_head_dim=3"], "model.attention.qk_rope_head_dim=3: must be positive and even"),
        (
            ["--model.attention.num_kv_heads=3"],
            "model.attention.num_kv_heads=3: must divide model.attention.num_heads (4); try 2 or 4",
        ),
        (["--model.attention.rope.factor=-1"], "model.attention.rope.factor=-1.0: must be positive"),
        ([*MOE, "--model.moe.top_k=17"], "model.moe.top_k=17: must be at most 16, the experts in the kept groups"),
        (
            [*MOE, "--model.moe.num_groups=3"],
            "model.moe.num_groups=3: must divide model.moe.num_experts (16); try 2, 4, 8 or 16",
        ),
        ([*MOE, "--model.moe.top_k_groups=2"], "model.moe.top_k_groups=2: must be at most model.moe.num_groups (1)"),
        (
            [*MOE, "--model.moe.num_groups=16", "--model.moe.top_k_groups=4"],
            "model.moe.num_groups=16: each group needs two experts at least",
        ),
        ([*MOE, "--model.moe.pad_to_capacity=true"], "model.moe.pad_to_capacity=True: needs model.moe.capacity_factor"),
        (["--data.sequence_length=-1"], "data.sequence_length=-1: must be positive"),
        (["--optimizer.beta2=1"], "optimizer.beta2=1.0: must be in [0, 1)"),
        (["--train.keep_checkpoints=0"], "train.keep_checkpoints=0: must be positive"),
    ],
)
def test_a_value_that_cannot_work_is_named_with_what_fits(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(flags)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("world_size", "flags", "start"),
    [
        (3, [*MOE, "--parallel.ep=3"], "parallel.ep=3: must divide the number of experts (16); try 2, 4, 8 or 16"),
        (2, ["--parallel.ep=2"], "parallel.ep=2: the model has no experts (model.moe.num_experts=0); use 1"),
        (3, ["--parallel.tp=3"], "parallel.tp=3: must divide model.attention.num_heads (4); try 2 or 4"),
        (5, [*MOE, "--parallel.etp=5"], "parallel.etp=5: must divide model.moe.ffn_hidden_size (64); try 2, 4"),
        (2, ["--parallel.cp=2"], "parallel.cp=2: context parallelism is not built into the model; use 1"),
        (4, ["--parallel.pp=8"], "parallel.pp=8: must divide the number of processes, 4; try 2 or 4"),
        (3, ["--train.global_batch_size=16"], "train.global_batch_size=16: must be a multiple of data-parallel size"),
        (1, ["--data.sequence_length=8192"], "data.sequence_length=8192: must be at most model.max_position (4096)"),
        (
            4,
            ["--parallel.tp=4", "--data.sequence_length=6"],
            "parallel.tp=4: must divide train.microbatch_size x data.sequence_length (6)",
        ),
    ],
)
def test_settings_that_do_not_fit_the_processes_are_named(world_size: int, flags: list[str], start: str) -> None:
    parsed = parse_config(flags)
    with pytest.raises(ConfigError) as caught:
        parsed.validate(world_size)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("number", "phrase"), [(1, "1"), (2, "2"), (7, "7"), (6, "2, 3 or 6"), (16, "2, 4, 8 or 16")])
def test_divisors_are_a_phrase(number: int, phrase: str) -> None:
    assert divisors(number) == phrase


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_configs_are_read_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    parsed = parse_config([f"--config={path}"])
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(parsed), encoding="utf-8")
    assert parse_config([f"--config={stored}"]) == parsed != Config()


@pytest.mark.parametrize(
    ("name", "world_size", "flags"),
    [
        ("r1_tiny", 1, []),
        ("r1_tiny", 4, []),
        ("r1_tiny", 4, ["--parallel.pp=2", "--parallel.ep=2"]),
        ("r1_tiny", 8, ["--parallel.tp=2", "--parallel.pp=2", "--parallel.ep=4"]),
        ("moonlight_16b", 32, []),
        ("r1_671b", 2048, []),
    ],
)
def test_example_configs_fit_the_layouts_they_are_for(name: str, world_size: int, flags: list[str]) -> None:
    parse_config([f"--config={CONFIGS / name}.yaml", *flags]).validate(world_size)


def test_dump_and_parse_keep_every_setting_when_none_is_its_default(tmp_path: Path) -> None:
    changed = Config(
        model=config.ModelConfig(
            checkpoint="[dir] 1e3",
            norm_eps=1e-12,
            num_mtp_layers=2,
            attention=config.AttentionConfig(
                kind="gqa", num_heads=8, num_kv_heads=2, rope=config.RopeConfig(theta=1e6)
            ),
            moe=config.MoEConfig(num_experts=8, capacity_factor=1.25, score_bias=False),
        ),
        parallel=config.ParallelConfig(tp=2, placement="Et*3|t*4mL"),
        data=config.DataConfig(train=["0.7", "a b", "0.3", "c:d"], tokenizer="ü.model"),
        optimizer=config.OptimizerConfig(learning_rate=3e-4, schedule="wsd"),
        train=config.TrainConfig(seed=7, output_dir="007", sample_prompt="<think>\n# 'x': \"y\" <｜User｜>"),
    )
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(changed), encoding="utf-8")
    assert parse_config(["--config", str(stored)]) == changed


def test_every_setting_is_described_in_its_class() -> None:
    pending = [Config]
    while pending:
        cls = pending.pop()
        for setting in dataclasses.fields(cls):
            assert f"\n        {setting.name}: " in (cls.__doc__ or ""), f"{cls.__name__}.{setting.name}"
            if dataclasses.is_dataclass(setting.default_factory):
                pending.append(setting.default_factory)
