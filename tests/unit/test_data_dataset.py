"""Samples, their order and who gets them: functions of (files, seed) alone. Damaged files are one line."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy
import pytest
import torch

from r1mega.config import Config, ConfigError, DataConfig, ModelConfig
from r1mega.data import files
from r1mega.data.check import check_data
from r1mega.data.dataset import TokenDataset, build_dataset
from r1mega.data.files import cached_arrays, whole_folder
from r1mega.data.index import checksum, parse_blend, read_index
from r1mega.data.loader import StepLoader
from r1mega.data.megatron import quiet_import

SEQUENCE = 8
pytestmark = pytest.mark.filterwarnings("error")


def write_documents(prefix: Path, lengths: list[int], first: int = 0) -> str:
    """Documents of consecutive token ids, written with megatron-core's own builder."""
    with quiet_import():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in lengths:
        builder.add_document(list(range(first, first + length)), [length])
        first += length
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_documents(tmp_path / "a", [3, 50, 1, 20, 7, 200, 11])


def rows(dataset: TokenDataset, count: int | None = None) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in range(len(dataset) if count is None else count)]


def test_labels_are_the_next_tokens_and_an_epoch_visits_each_label_once(prefix: str) -> None:
    per_epoch = (292 - 1) // SEQUENCE
    dataset = build_dataset([prefix], SEQUENCE, per_epoch, seed=1)
    labels: Counter[int] = Counter()
    for i in range(len(dataset)):
        sample = dataset[i]
        assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
        assert sample["tokens"].shape == sample["labels"].shape == (SEQUENCE,)
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert bool(sample["loss_mask"].all())
        labels.update(sample["labels"].tolist())
    assert set(labels.values()) == {1} and len(labels) == per_epoch * SEQUENCE


def test_first_epoch_is_megatrons_own_order(prefix: str, tmp_path: Path) -> None:
    with quiet_import():
        from megatron.core.datasets.gpt_dataset import GPTDataset
    from r1mega.data.packing import Epoch

    ours = build_dataset([prefix], SEQUENCE, 36, seed=5)
    epoch = ours.files[0].epoch(0)
    assert isinstance(epoch, Epoch)
    epoch.config.path_to_cache = str(tmp_path / "megatron")
    theirs = GPTDataset(epoch.dataset, prefix, epoch.indices, None, epoch.index_split, epoch.config)
    assert len(theirs) == 36
    assert rows(ours) == [theirs[i]["tokens"].tolist() for i in range(36)]


@pytest.mark.parametrize("blended", [False, True])
def test_longer_dataset_begins_with_the_shorter_one(prefix: str, tmp_path: Path, blended: bool) -> None:
    other = write_documents(tmp_path / "b", [40, 40, 60], first=1000)
    blend = ["0.75", prefix, "0.25", other] if blended else [prefix]
    short, long = (build_dataset(blend, SEQUENCE, n, seed=3) for n in (20, 200))
    assert rows(short) == rows(long, 20)
    assert len(long) == 200  # several epochs


def test_epochs_and_seeds_differ_in_order(prefix: str) -> None:
    n = 36
    dataset = build_dataset([prefix], SEQUENCE, 2 * n, seed=3)
    everything = rows(dataset)
    assert everything[:n] != everything[n:]
    assert everything[:n] != rows(build_dataset([prefix], SEQUENCE, n, seed=4))
    assert everything == rows(build_dataset([prefix], SEQUENCE, 2 * n, seed=3))


def test_order_does_not_depend_on_where_the_files_lie_or_on_the_cache(prefix: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = write_documents(tmp_path / "elsewhere" / "x", [3, 50, 1, 20, 7, 200, 11])
    first = rows(build_dataset([prefix], SEQUENCE, 50, seed=1))
    assert first == rows(build_dataset([prefix], SEQUENCE, 50, seed=1))
    assert first == rows(build_dataset([moved], SEQUENCE, 50, seed=1, cache_dir=str(tmp_path / "another cache")))


def test_changed_file_under_the_same_name_gets_a_new_order(prefix: str, tmp_path: Path) -> None:
    build_dataset([prefix], SEQUENCE, 20, seed=1)
    write_documents(tmp_path / "a", [60, 40, 30])
    dataset = build_dataset([prefix], SEQUENCE, 16, seed=1)
    assert sorted(token for row in rows(dataset) for token in row)[-1] < 130


def test_blend_keeps_its_weights_and_without_weights_the_sizes_decide(prefix: str, tmp_path: Path) -> None:
    other = write_documents(tmp_path / "b", [90, 58], first=1000)

    def share(blend: list[str]) -> float:
        return sum(row[0] >= 1000 for row in rows(build_dataset(blend, SEQUENCE, 200, seed=1))) / 200

    assert share(["3", prefix, "1", other]) == pytest.approx(0.25, abs=0.01)
    assert share([prefix, other]) == pytest.approx(18 / (18 + 36), abs=0.01)


@pytest.mark.parametrize(
    "blend", [["0.5", "a", "b"], ["0.5", "a", "0.5"], ["a", "0.5"], ["0", "a", "1", "b"], ["nan", "a"], ["-1", "a"]]
)
def test_blend_that_cannot_be_is_one_line(blend: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.valid=[^\n]*$"):
        parse_blend(blend, "data.valid")


@pytest.mark.parametrize("microbatch_size", [1, 2])
def test_global_batch_does_not_depend_on_data_parallel_size(prefix: str, microbatch_size: int) -> None:
    dataset = build_dataset([prefix], SEQUENCE, 48, seed=1)
    for step in range(4):
        for dp_size in (1, 2, 3, 6):
            batches = []
            for rank in range(dp_size):
                batches += StepLoader(dataset, rank, dp_size, 12, microbatch_size).step(step)
            tokens = torch.cat([batch.tokens for batch in batches])
            assert tokens.tolist() == rows(dataset)[step * 12 : step * 12 + 12]
            assert {batch.tokens.shape[0] for batch in batches} == {microbatch_size}
            assert {(batch.num_loss_tokens, batch.num_sequences) for batch in batches} == {(12 * SEQUENCE, 12)}
            assert all(batch.loss_mask.dtype == torch.bool for batch in batches)


def test_step_is_a_function_of_its_number_with_and_without_prefetch(prefix: str) -> None:
    dataset = build_dataset([prefix], SEQUENCE, 24, seed=1)
    ahead, plain = StepLoader(dataset, 0, 1, 4, 2), StepLoader(dataset, 0, 1, 4, 2, prefetch=False)
    for step in (0, 1, 2, 5, 0, 3, 4):
        for a, b in zip(ahead.step(step), plain.step(step), strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
    ahead.close()
    assert torch.equal(ahead.step(2)[1].tokens, plain.step(2)[1].tokens)
    with pytest.raises(IndexError):
        plain.step(6)


class MaskedDataset:
    """Sample ``i`` has ``i`` labels that count."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.arange(SEQUENCE)
        return {"tokens": tokens, "labels": tokens, "loss_mask": tokens < index}


def test_masked_labels_are_counted_over_the_whole_global_batch_on_every_rank() -> None:
    counts = [StepLoader(MaskedDataset(), rank, 2, 4, 1).step(1)[0].num_loss_tokens for rank in range(2)]
    assert counts == [4 + 5 + 6 + 7] * 2


def test_global_batch_that_cannot_be_cut_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^train.global_batch_size=8: [^\n]*$"):
        StepLoader(MaskedDataset(), 0, 3, 8, 1)


def config_for(prefix: str, **settings: object) -> Config:
    data = DataConfig(train=[prefix], sequence_length=SEQUENCE)
    for name, value in settings.items():
        setattr(data, name, value)
    return Config(model=ModelConfig(vocab_size=512), data=data)


def cut(path: str, size: int) -> None:
    os.truncate(path, os.path.getsize(path) - size)


DAMAGE: dict[str, Callable[[str], None]] = {
    "missing bin": lambda prefix: os.unlink(f"{prefix}.bin"),
    "missing idx": lambda prefix: os.unlink(f"{prefix}.idx"),
    "bin cut short": lambda prefix: cut(f"{prefix}.bin", 2),
    "bin too long": lambda prefix: cut(f"{prefix}.bin", -2),
    "empty bin": lambda prefix: os.truncate(f"{prefix}.bin", 0),
    "idx cut short": lambda prefix: cut(f"{prefix}.idx", 1),
    "idx header cut short": lambda prefix: os.truncate(f"{prefix}.idx", 20),
    "idx of something else": lambda prefix: Path(f"{prefix}.idx").write_bytes(b"x" * 500),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_one_line_that_names_the_file(prefix: str, name: str) -> None:
    check_data(config_for(prefix))
    DAMAGE[name](prefix)
    file = "bin" if "bin" in name else "idx"
    with pytest.raises(ConfigError, match=rf"^data\.train=[^\n]*a\.{file}[^\n]*$"):
        check_data(config_for(prefix))
    with pytest.raises(ConfigError, match=rf"^[^\n]*a\.{file}[^\n]*$"):
        build_dataset([prefix], SEQUENCE, 4, seed=1)


def test_validation_files_are_checked_too(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.valid=[^\n]*nowhere\.bin"):
        check_data(config_for(prefix, valid=["nowhere"]))


def test_token_ids_that_the_model_does_not_have_are_one_line(prefix: str) -> None:
    config = config_for(prefix)
    config.model.vocab_size = 291
    with pytest.raises(ConfigError, match=r"^model\.vocab_size=291: [^\n]*a\.bin[^\n]*token id 291[^\n]*$"):
        check_data(config)
    check_data(config, contents=False)


def test_checksum_of_other_data_is_one_line(prefix: str) -> None:
    check_data(config_for(prefix, checksum=checksum([prefix])))
    with pytest.raises(ConfigError, match=r"^data\.checksum=0000: [^\n]*$"):
        check_data(config_for(prefix, checksum="0000"))


def test_no_data_and_too_little_data_are_one_line(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.train=\[\]: "):
        check_data(config_for(prefix, train=[]))
    for attempt in (
        lambda: check_data(config_for(prefix, sequence_length=292)),
        lambda: build_dataset([prefix], 292, 1, seed=1),
    ):
        with pytest.raises(ConfigError, match=r"^data\.sequence_length=292: [^\n]*a\.bin[^\n]*$"):
            attempt()
    check_data(config_for(prefix, sequence_length=291))
    assert len(build_dataset([prefix], 291, 1, seed=1)[0]["tokens"]) == 291


def test_cache_that_cannot_be_written_is_one_line(prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for attempt in (
        lambda: check_data(config_for(prefix, cache_dir=str(file / "cache"))),
        lambda: build_dataset([prefix], SEQUENCE, 4, seed=1, cache_dir=str(file / "cache")),
    ):
        with pytest.raises(ConfigError, match=r"^data\.cache_dir=[^\n]*$"):
            attempt()


def test_index_with_modes_and_wide_tokens_is_read(tmp_path: Path) -> None:
    with quiet_import():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=numpy.int32, multimodal=True)
    builder.add_document([1, 2, 70000], [2, 1], [0, 0])
    builder.finalize(str(tmp_path / "m.idx"))
    index = read_index(str(tmp_path / "m"), "data.train")
    assert index.lengths.tolist() == [2, 1] and index.tokens().tolist() == [1, 2, 70000]


def run_and_die(action: Callable[[], object]) -> None:
    """Run ``action`` in a forked process, which must not come to its end."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_writer_leaves_nothing_that_looks_complete_and_the_next_one_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def die_halfway() -> None:
        with whole_folder(target) as partial:
            assert partial is not None
            (partial / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    run_and_die(die_halfway)
    assert not target.exists()
    with whole_folder(target) as partial:
        assert partial is not None
        (partial / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in target.iterdir()] == ["whole"]
    with whole_folder(target) as partial:
        assert partial is None


def test_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), whole_folder(tmp_path / "folder"):
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_of_many_processes_one_builds_and_all_read(tmp_path: Path) -> None:
    def build() -> dict[str, numpy.ndarray]:
        with open(tmp_path / "builds", "a") as file:
            file.write("x")
        time.sleep(0.3)  # long enough for all to want it
        return {"numbers": numpy.arange(1000)}

    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            same = bool((cached_arrays(tmp_path / "cache", "key", build)["numbers"] == numpy.arange(1000)).all())
            os._exit(0 if same else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert (tmp_path / "builds").read_text() == "x"


def test_folder_that_another_process_finishes_just_before_the_lock_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, flock = tmp_path / "folder", fcntl.flock

    def finish_then_lock(lock: IO[bytes], operation: int) -> None:
        target.mkdir()
        (target / "theirs").write_text("whole")
        flock(lock, operation)

    monkeypatch.setattr(files.fcntl, "flock", finish_then_lock)
    with whole_folder(target) as partial:
        assert partial is None
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (target / "theirs").read_text() == "whole"


def test_folder_that_another_process_renames_while_it_is_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pathlib raises although exist_ok is given: what was in the way has gone when it looks."""
    make, refusals = Path.mkdir, [FileExistsError(17, "File exists")]

    def mkdir(self: Path, *arguments: object, **named: object) -> None:
        if refusals:
            raise refusals.pop()
        make(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with whole_folder(tmp_path / "target") as folder:
        assert folder is not None
    (tmp_path / ".other.partial").write_text("a file")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "other"):
        pass


def test_folder_stays_locked_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, locks = os.rename, []

    def look_then_rename(source: Path, to: Path) -> None:
        locks.append((source / ".lock").exists())
        rename(source, to)

    monkeypatch.setattr(files.os, "rename", look_then_rename)
    with whole_folder(tmp_path / "folder") as partial:
        assert partial is not None
        (partial / "ours").write_text("whole")
    assert locks == [True]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["ours"]
