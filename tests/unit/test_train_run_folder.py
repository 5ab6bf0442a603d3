"""Whether a run may begin, or go on, in a folder."""

from __future__ import annotations

import pytest

from r1mega.config import Config, ConfigError, ModelConfig, TrainConfig
from r1mega.files import write_whole
from r1mega.settings import dump_config
from r1mega.train.run_folder import prepare_folder


def job(folder, **settings) -> Config:
    model = settings.pop("model", ModelConfig())
    return Config(model=model, train=TrainConfig(output_dir=str(folder), **settings))


def test_a_new_folder_is_made_and_holds_the_settings(tmp_path):
    config = job(tmp_path / "runs" / "new")
    assert prepare_folder(config) is None
    assert (tmp_path / "runs" / "new" / "config.yaml").read_text() == dump_config(config)


@pytest.mark.parametrize("left_by_a_run", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_a_folder_that_holds_another_run_is_refused_and_not_touched(tmp_path, left_by_a_run):
    (tmp_path / left_by_a_run).write_text("theirs")
    with pytest.raises(ConfigError, match=r"train\.output_dir=.* holds another run; .*--train\.resume true"):
        prepare_folder(job(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [left_by_a_run]
    assert (tmp_path / left_by_a_run).read_text() == "theirs"


def test_a_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    prepare_folder(job(tmp_path))


def test_resume_without_a_checkpoint_begins_anew(tmp_path):
    prepare_folder(job(tmp_path))
    assert prepare_folder(job(tmp_path, resume=True)) is None


def test_resume_with_another_model_is_refused_even_without_a_checkpoint(tmp_path):
    prepare_folder(job(tmp_path))
    with pytest.raises(ConfigError, match=r"^model\.hidden_size=64: must be 128, as in the run in [^\n]*$"):
        prepare_folder(job(tmp_path, resume=True, model=ModelConfig(hidden_size=64)))


def test_resume_with_another_seed_is_refused(tmp_path):
    prepare_folder(job(tmp_path))
    with pytest.raises(ConfigError, match=r"^train\.seed=7: must be 1234"):
        prepare_folder(job(tmp_path, resume=True, seed=7))


def test_resume_may_make_the_run_longer(tmp_path):
    prepare_folder(job(tmp_path, num_steps=10))
    prepare_folder(job(tmp_path, num_steps=20, resume=True))
    assert "num_steps: 20" in (tmp_path / "config.yaml").read_text()


def test_what_an_interrupted_save_left_behind_is_removed(tmp_path):
    (tmp_path / "checkpoints" / ".step_00000003.tmp").mkdir(parents=True)
    prepare_folder(job(tmp_path, resume=True))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_file_in_place_of_the_folder_is_one_line(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"^train\.output_dir=.*: cannot be written: [^\n]*$"):
        prepare_folder(job(tmp_path / "run"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
