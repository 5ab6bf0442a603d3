"""Whether a run may begin, or go on, in a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
import pytest

from r1mega.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from r1mega.files import write_whole
from r1mega.settings import dump_config
from r1mega.train.run_folder import DATA_FILE, check_folder, prepare_folder
from tests.unit.test_bad_input import write_file


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


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder with the files ``a`` and ``b``, as long as each other, of other tokens."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, name in enumerate("ab"):
        prefix = write_file(folder / name, [40], 40)
        numpy.full(40, number, numpy.uint16).tofile(f"{prefix}.bin")
    return folder


def on(run, train: list, **settings) -> Config:
    """A run in the folder ``run`` that goes on if it can, on the files ``train``."""
    config = job(run, resume=True, **settings)
    config.data = DataConfig(train=[str(word) for word in train])
    return config


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare_folder(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_resume_on_other_data_of_the_same_size_is_refused(tmp_path, corpus):
    run = tmp_path / "run"
    prepare_folder(on(run, [corpus / "a"]))
    assert refusal(on(run, [corpus / "b"])) == (
        f"data.train=[{corpus / 'b'}]: must hold what [{corpus / 'a'}] held, as in the run in {run}; "
        "or name another train.output_dir"
    )


def test_resume_with_other_weights_is_refused(tmp_path, corpus):
    run = tmp_path / "run"
    prepare_folder(on(run, [0.7, corpus / "a", 0.3, corpus / "b"]))
    check_folder(on(run, ["0.70", corpus / "a", "3e-1", corpus / "b"]))
    for blend in ([0.6, corpus / "a", 0.4, corpus / "b"], [corpus / "a", corpus / "b"]):
        assert f"must be weighted as in [0.7, {corpus / 'a'}, 0.3, {corpus / 'b'}]" in refusal(on(run, blend))
    assert "must hold what" in refusal(on(run, [0.7, corpus / "b", 0.3, corpus / "a"]))


def test_resume_finds_data_that_have_moved(tmp_path, corpus):
    prepare_folder(on(tmp_path / "run", [corpus / "a"]))
    moved = shutil.move(corpus, tmp_path / "elsewhere")
    assert prepare_folder(on(tmp_path / "run", [Path(moved) / "a"])) is None


def test_resume_of_a_run_without_fingerprints_compares_paths(tmp_path, corpus):
    run = tmp_path / "run"
    prepare_folder(on(run, [corpus / "a"]))
    (run / DATA_FILE).unlink()
    found = refusal(on(run, [corpus / "b"]))
    assert found.startswith(f"data.train=['{corpus / 'b'}']: must be ['{corpus / 'a'}'], as in the run in {run}")
    prepare_folder(on(run, [corpus / "a"]))
    assert (run / DATA_FILE).exists()


def test_resume_with_another_tokenizer_is_refused(tmp_path, corpus, monkeypatch):
    """The tokenizers are stand-ins: their fingerprint is their name's first letter."""
    monkeypatch.setattr("r1mega.data.identity.Tokenizer.load", lambda path: path)
    monkeypatch.setattr("r1mega.data.identity.fingerprint", lambda path: path[0])
    config = on(tmp_path / "run", [corpus / "a"])
    config.data.tokenizer = "first"
    prepare_folder(config)
    config.data.tokenizer = "fast"
    prepare_folder(config)
    config.data.tokenizer = "second"
    assert refusal(config).startswith("data.tokenizer=second: must encode as first does, as in the run in ")


def test_fingerprints_that_cannot_be_read_are_one_line(tmp_path, corpus):
    prepare_folder(on(tmp_path / "run", [corpus / "a"]))
    (tmp_path / "run" / DATA_FILE).write_text("{}")
    assert "data.json cannot be read" in refusal(on(tmp_path / "run", [corpus / "a"]))


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
