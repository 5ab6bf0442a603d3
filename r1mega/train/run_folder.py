"""The output folder of a run: what lies where, and whether a run may begin or go on there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from r1mega.config import Config, ConfigError
from r1mega.data.identity import data_identity, difference
from r1mega.files import write_whole
from r1mega.settings import dump_config
from r1mega.train.checkpoint_files import (
    CONFIG_FILE,
    DATA_SETTINGS,
    check,
    first_difference,
    newest_checkpoint,
    read_progress,
    read_settings,
    remove_stale,
)
from r1mega.train.metrics import METRICS_FILE, read_metrics

CHECKPOINT_FOLDER = "checkpoints"
DATA_FILE = "data.json"
LOSS_PICTURE = "loss.png"
LOAD_PICTURE = "expert_load.png"


@contextmanager
def lock_folder(config: Config) -> Iterator[None]:
    """Keep other runs out of ``train.output_dir``, which is made if it is not there, until the block ends.

    The kernel drops the lock with its process, so a run that was killed keeps nobody out.

    Raises:
        ConfigError: another run is at work there, or the folder cannot be made.
    """
    folder = Path(config.train.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Network file systems that know no such locks answer otherwise, and go without.
        if error.errno == errno.EWOULDBLOCK:
            os.close(descriptor)
            raise ConfigError(
                f"train.output_dir={folder}: another run is at work there; end it first, or name another folder"
            ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def _cannot_be_written(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"train.output_dir={folder}: cannot be written: {error.strerror}")


def prepare_folder(config: Config) -> Path | None:
    """Check and prepare ``train.output_dir``; rank 0 does it, before any process group is made.

    Returns:
        The checkpoint to go on from, None to begin at the beginning.

    Raises:
        ConfigError: the folder holds another run, cannot be written, or its checkpoint does not fit.
    """
    checkpoint = check_folder(config)
    folder = Path(config.train.output_dir)
    try:
        (folder / CHECKPOINT_FOLDER).mkdir(parents=True, exist_ok=True)
        remove_stale(folder / CHECKPOINT_FOLDER)
        # A run that has no step to take leaves the settings of the steps that were taken.
        if checkpoint is None or read_progress(checkpoint).step < config.train.num_steps:
            if not (folder / DATA_FILE).exists():
                write_whole(folder / DATA_FILE, json.dumps(data_identity(config.data), indent=1) + "\n")
            write_whole(folder / CONFIG_FILE, dump_config(config))
    except OSError as error:
        raise _cannot_be_written(folder, error) from error
    return checkpoint


def check_folder(config: Config) -> Path | None:
    """What :func:`prepare_folder` returns and raises, without a change to the folder."""
    folder = Path(config.train.output_dir)
    checkpoint = None
    if _holds_run(folder):
        if not config.train.resume:
            raise ConfigError(
                f"train.output_dir={folder}: holds another run; name another folder, "
                "or add --train.resume true to go on with it"
            )
        _check_metrics(folder)
        checkpoint = newest_checkpoint(folder / CHECKPOINT_FOLDER)
        if checkpoint is not None:
            check(checkpoint, config)
            _check_same_data(folder, read_settings(checkpoint), config)
        else:
            _check_same_data(folder, _check_settings(folder / CONFIG_FILE, config), config)
    return checkpoint


def _holds_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (CONFIG_FILE, CHECKPOINT_FOLDER, METRICS_FILE))


def _check_metrics(folder: Path) -> None:
    """The lines of a run that goes on are kept, so they must be its own."""
    try:
        readable = all(isinstance(line["step"], int) for line in read_metrics(folder / METRICS_FILE))
    except (OSError, ValueError, TypeError, KeyError):
        readable = False
    if not readable:
        raise ConfigError(f"train.output_dir={folder}: {METRICS_FILE} cannot be read; move it away to go on")


def _check_same_data(folder: Path, settings: dict, config: Config) -> None:
    """A run goes on with the data that it has begun with. They may move; without their fingerprints, only paths tell.

    Args:
        folder: of the run.
        settings: that it has had so far.
        config: of the run that shall go on.
    """
    path = folder / DATA_FILE
    if not path.exists():
        checksums = [settings.get("data", {}).get("checksum"), config.data.checksum]
        same_bytes = checksums[0] is not None and checksums[0] == checksums[1]
        changed = None if same_bytes else first_difference(settings, config.to_dict(), DATA_SETTINGS)
        found = f"{changed[0]}={changed[2]}: must be {changed[1]}" if changed is not None else None
    else:
        try:
            found = difference(json.loads(path.read_text(encoding="utf-8")), data_identity(config.data))
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"train.output_dir={folder}: {DATA_FILE} cannot be read; name another folder") from error
    if found is not None:
        raise ConfigError(f"{found}, as in the run in {folder}; or name another train.output_dir")


def _check_settings(path: Path, config: Config) -> dict:
    """A run that never got to a checkpoint begins anew, but not as another run. Returns the settings that it had."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"train.output_dir={path.parent}: {path.name} cannot be read; name another folder")
    changed = first_difference(settings, config.to_dict()) if settings else None
    if changed is not None:
        name, there, here = changed
        raise ConfigError(f"{name}={here}: must be {there}, as in the run in {path.parent}; or name another folder")
    return settings
