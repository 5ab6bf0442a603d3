"""Checkpoints: complete or invisible, for every layout, and clear about what is wrong with one."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from r1mega.config import Config, ConfigError, ModelConfig, TrainConfig
from r1mega.optim.adamw import AdamW
from r1mega.optim.gradients import Gradients
from r1mega.parallel_state import Layout
from r1mega.train import checkpoint, checkpoint_files
from r1mega.train.checkpoint import Checkpointer, CheckpointError, load
from r1mega.train.checkpoint_files import (
    Progress,
    check,
    complete_checkpoints,
    newest_checkpoint,
    read_tensors,
    remove_stale,
)
from r1mega.train.learner import training_tensors
from tests.distributed.toy_model import backward, build, whole_tensor

CONFIG = Config(train=TrainConfig(keep_checkpoints=2))


def trained(world_size: int, layout: dict, settings: dict):
    """A toy stage and its optimizer after one step."""
    stage, parameters, state = build(Layout(world_size, **layout), **settings)
    optimizer = AdamW(parameters, CONFIG.optimizer)
    backward(stage, state)
    gradients = Gradients(parameters, state)
    gradients.finish()
    optimizer.step(0.01)
    return stage, parameters, optimizer


def save_steps(rank: int, world_size: int, folder: Path, steps: list[int], layout: dict, settings: dict) -> None:
    warnings.simplefilter("error")
    stage, _, optimizer = trained(world_size, layout, settings)
    for layer in stage.layers.values():
        layer.e_score_correction_bias.fill_(0.25)
    checkpointer = Checkpointer(folder, CONFIG)
    for step in steps:
        checkpointer.save(Progress(step, 100 * step), training_tensors([stage], optimizer))
    checkpointer.finish()


def load_and_compare(rank: int, world_size: int, path: Path, layout: dict, settings: dict) -> float:
    """The largest difference between what a checkpoint gives and what training here gives."""
    warnings.simplefilter("error")
    expected = {name: t.clone() for name, t in training_tensors(*_pair(trained(world_size, layout, settings))).items()}
    stage, parameters, _ = build(Layout(world_size, **layout), **settings)
    optimizer = AdamW(parameters, CONFIG.optimizer)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.to_local().fill_(torch.nan)
    tensors = training_tensors([stage], optimizer)
    assert load(path, tensors) == Progress(3, 300)
    assert all((layer.e_score_correction_bias == 0.25).all() for layer in stage.layers.values())
    return max(
        _largest(_local(tensors[name]) - _local(whole)) for name, whole in expected.items() if not name.endswith("bias")
    )


def _pair(trio):
    return [trio[0]], trio[2]


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _largest(difference) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_loads_into_any_layout(pool, tmp_path, tied):
    settings = {"tied": tied}
    pool.run(save_steps, 4, tmp_path, [1, 2, 3], {"pp": 2, "ep": 2}, settings)
    layouts = [(4, {"pp": 2, "ep": 2}), (1, {}), (3, {}), (4, {"tp": 2, "etp": 2}), (4, {"tp": 4, "ep": 2})]
    for world_size, layout in layouts:
        for difference in pool.run(load_and_compare, world_size, tmp_path / "step_00000003", layout, settings):
            assert difference < 1e-14, f"into {world_size} ranks, {layout}"


def test_shards_cut_twice_in_one_dimension_load_elsewhere(pool, tmp_path):
    pool.run(save_steps, 4, tmp_path, [3], {"tp": 2}, {})
    assert max(pool.run(load_and_compare, 1, tmp_path / "step_00000003", {}, {})) < 1e-14


def test_the_newest_checkpoints_stay_and_nothing_else(pool, tmp_path):
    pool.run(save_steps, 2, tmp_path, [1, 2, 3], {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000003"


def test_the_model_can_be_read_tensor_by_tensor_without_a_process_group(pool, tmp_path):
    pool.run(save_steps, 4, tmp_path, [3], {"tp": 2}, {})
    tensors = dict(read_tensors(tmp_path / "step_00000003"))
    assert tensors["layers.0.column"].shape == (8, 12)
    assert not any("exp_avg" in name for name in tensors)
    assert (tensors["layers.1.e_score_correction_bias"] == 0.25).all()
    expected = pool.run(whole_weights, 1)[0]
    for name, whole in expected.items():
        torch.testing.assert_close(tensors[name], whole, rtol=0, atol=1e-14)


def whole_weights(rank: int, world_size: int) -> dict:
    return {name: parameter.to_local().detach() for name, parameter in trained(1, {}, {})[1]}


@pytest.fixture
def saved(pool, tmp_path) -> Path:
    pool.run(save_steps, 2, tmp_path, [3], {}, {})
    return tmp_path / "step_00000003"


def test_a_whole_checkpoint_of_the_same_model_passes_the_check(saved):
    assert check(saved, CONFIG) == Progress(3, 300)


def test_another_model_is_one_line_that_names_the_first_difference(saved):
    with pytest.raises(ConfigError, match=r"^model\.num_layers=5: must be 4, as in the checkpoint [^\n]*$"):
        check(saved, Config(model=ModelConfig(num_layers=5, max_position=1)))


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "config.yaml", "progress.json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_checkpoint_that_was_cut_short_is_one_line(saved, name, damage):
    if damage == "missing":
        (saved / name).unlink()
    else:
        os.truncate(saved / name, 10)
    with pytest.raises(ConfigError, match=rf"^checkpoint [^\n]* is cut short: {re.escape(name)} ?[^\n]*$"):
        check(saved, CONFIG)


def test_metadata_that_would_run_code_is_refused(saved):
    (saved / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ConfigError, match="system has no place in a checkpoint"):
        check(saved, CONFIG)


def save_on_a_full_disk(rank: int, world_size: int, folder: Path, full_rank: int) -> str:
    stage, _, optimizer = trained(world_size, {}, {})
    tensors = training_tensors([stage], optimizer)
    checkpointer = Checkpointer(folder, CONFIG)
    checkpointer.save(Progress(1, 1), tensors)
    checkpointer.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if rank == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        checkpointer.save(Progress(2, 2), tensors)
        checkpointer.finish()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_is_one_line_on_every_rank_and_the_last_checkpoint_survives(pool, tmp_path, full_rank):
    line = rf"checkpoint {tmp_path}/step_00000002 was not saved: .*File too large; .*step_00000001"
    for message in pool.run(save_on_a_full_disk, 2, tmp_path, full_rank):
        assert re.fullmatch(line, message)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


DIES_BEFORE_PUBLISHING = """
import os, signal, sys
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from r1mega.train import checkpoint
from tests.distributed.test_checkpoint import save_steps
rename = os.rename
def die(source, target):
    if str(target).endswith("step_00000002"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
checkpoint.os.rename = die
save_steps(0, 1, Path(sys.argv[1]), [1, 2], {}, {})
"""


def test_a_process_killed_while_saving_leaves_the_last_checkpoint(pool, tmp_path):
    done = subprocess.run([sys.executable, "-c", DIES_BEFORE_PUBLISHING, str(tmp_path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".step_00000002.tmp").exists(), "the process did not die in the middle of a save"
    assert complete_checkpoints(tmp_path) == [tmp_path / "step_00000001"]
    check(tmp_path / "step_00000001", CONFIG)
    remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_no_part_of_the_module_unpickles_freely():
    for module in (checkpoint, checkpoint_files):
        assert "pickle.load" not in Path(module.__file__).read_text()


def test_the_toy_weights_differ_from_parameter_to_parameter():
    """Otherwise a checkpoint that mixes up names would pass."""
    assert not torch.equal(whole_tensor("a", (4,)), whole_tensor("b", (4,)))
