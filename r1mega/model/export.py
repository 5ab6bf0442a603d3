"""``r1mega export``: the newest checkpoint of a run as a Hugging Face folder, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.config import Config, ConfigError, ModelConfig
from r1mega.files import sync
from r1mega.model.huggingface_config import CONFIG_FILE, from_huggingface, read_config
from r1mega.model.huggingface_config_writer import to_huggingface
from r1mega.model.huggingface_difference import first_difference
from r1mega.model.huggingface_files import INDEX_FILE, SINGLE_FILE, check_entries, read_entries
from r1mega.model.huggingface_names import VALUE_HEAD, copied_tensors, matrices, parameter_shapes, to_huggingface_name
from r1mega.model.huggingface_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_FILE = 5_000_000_000  # bytes
GENERATION_FILE = "generation_config.json"
BIAS = "e_score_correction_bias"


def export(run: str | Path, out: str | Path) -> int:
    """Write the newest complete checkpoint of ``run`` as safetensors, ``config.json`` and the tokenizer.

    The folder appears under its name when all is written and checked: every tensor of the model is there once, in its
    shape, and the configuration reads back as the model's.

    Args:
        run: a run's output folder.
        out: the folder to write; must not exist, or be empty.

    Returns:
        0, the exit status.

    Raises:
        ConfigError: one line: no complete checkpoint, a model that no Hugging Face architecture has, a tokenizer that
            cannot be converted, a folder that is not empty or cannot be written.
    """
    from r1mega.settings import parse_config
    from r1mega.train.checkpoint import CONFIG_FILE as RUN_CONFIG_FILE
    from r1mega.train.checkpoint import check, newest_checkpoint, read_tensors
    from r1mega.train.checkpoint_files import read_settings

    run, out = Path(run), Path(out)
    checkpoint = newest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ConfigError(f"RUN={run}: holds no complete checkpoint")
    read_settings(checkpoint)  # where it is gone, the checkpoint is cut short, and no setting of the user's is wrong
    config = parse_config(["--config", str(checkpoint / RUN_CONFIG_FILE)])
    check(checkpoint, config)
    _check_out(out)
    temporary = out.resolve().with_name(f".{out.resolve().name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        summary = _write(config, read_tensors(checkpoint), temporary)
        os.replace(temporary, out.resolve())
        sync(out.resolve().parent)
    except OSError as error:
        raise ConfigError(f"OUT={out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"exported {checkpoint} to {out}: {summary}")
    return 0


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"OUT={out}: is a file; give a folder that is not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"OUT={out}: is not empty; give a folder that is not there yet, or an empty one")


def _write(config: Config, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> str:
    """Write and check everything; returns a summary of one line."""
    import torch

    model = as_stored(config.model)
    dtype = getattr(torch, stored_type(config))
    write_settings(config, folder)
    files = FileWriter(folder)
    for name, tensor in huggingface_tensors(tensors, model, dtype):
        files.add(name, tensor)
    num_files = files.finish()
    entries = read_entries(folder)
    check_entries(entries, model, folder)
    for path in folder.iterdir():
        sync(path)
    sync(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    files_written = f"{num_files} file{'s' * (num_files > 1)}, {size / 1e6:,.1f} MB"
    return f"{len(entries)} tensors in {stored_type(config)}, {files_written}"


def write_settings(config: Config, folder: Path) -> None:
    """Everything of a Hugging Face folder but the weights: ``config.json``, how to generate, the tokenizer.

    Raises:
        ConfigError: a model that no Hugging Face architecture has, or a tokenizer that cannot be converted.
    """
    model, dtype = as_stored(config.model), stored_type(config)
    to_huggingface(model, dtype, {})  # a model that cannot be expressed is refused before anything is written
    if config.data.tokenizer is None:
        raise ConfigError("data.tokenizer=null: the run has no tokenizer to export")
    token_ids = write_tokenizer(config.data.tokenizer, folder, model.max_position)
    write_json(folder / CONFIG_FILE, to_huggingface(model, dtype, token_ids))
    known_ids = {name: index for name, index in token_ids.items() if index is not None}
    write_json(folder / GENERATION_FILE, {"_from_model_config": True} | known_ids)
    difference = first_difference(model, from_huggingface(read_config(folder)))
    assert difference is None, f"{CONFIG_FILE} does not read back as the model: {difference}"


def stored_type(config: Config) -> str:
    """The type of the stored weights: that of the computation, but for float64."""
    return "bfloat16" if config.train.dtype == "bfloat16" else "float32"


def as_stored(model: ModelConfig) -> ModelConfig:
    """The model as a checkpoint holds it: DeepSeek's routers always have a score bias, zeros where ours has none."""
    if model.attention.kind == "mla" and model.moe.num_experts:
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, score_bias=True))
    return model


def huggingface_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """r1mega's tensors as Hugging Face's: one matrix an expert, and the copies that MTP layers carry.

    Args:
        tensors: names and whole tensors.
        config: the model.
        dtype: of the result; router biases stay float32.

    Raises:
        ConfigError: a tensor is left over, missing, or has another shape.
    """
    import torch

    shapes = parameter_shapes(config)
    missing = dict(shapes)
    for name, tensor in tensors:
        if name == VALUE_HEAD or (config.tie_embeddings and name == "lm_head.weight"):
            continue
        if missing.pop(name, None) is None:
            raise ConfigError(f"the run's checkpoint holds {name}, which the model of its config.yaml has no place for")
        if tuple(tensor.shape) != shapes[name]:
            raise ConfigError(
                f"{name} has shape {tuple(tensor.shape)} in the run's checkpoint, the model's is {shapes[name]}"
            )
        yield from huggingface_parts(name, tensor, config, dtype)
    for name in [name for name in missing if name.endswith(BIAS)]:
        yield to_huggingface_name(name, config), torch.zeros(missing.pop(name))
    if missing:
        raise ConfigError(f"the run's checkpoint lacks {next(iter(missing))}, one of {len(missing)} missing tensors")


def huggingface_parts(
    name: str, tensor: Tensor, config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """What Hugging Face has in place of one tensor of r1mega: see :func:`huggingface_tensors`."""
    import torch

    tensor = tensor.to(torch.float32 if name.endswith(BIAS) else dtype)
    if tensor.dim() > 2:
        for index in matrices(tuple(tensor.shape)):
            yield to_huggingface_name(name, config, index), tensor[index]
        return
    hf_name = to_huggingface_name(name, config)
    yield hf_name, tensor
    for copy, original in copied_tensors(config).items():
        if original == hf_name and copy != "lm_head.weight":
            yield copy, tensor


class FileWriter:
    """Collects tensors into files of at most :data:`LARGEST_FILE` bytes; writes the index where there are several."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = self._total_bytes = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._waiting and self._waiting_bytes + tensor.nbytes > LARGEST_FILE:
            self._flush()
        # safetensors refuses tensors that share their memory.
        self._waiting[name] = tensor.contiguous().clone()
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self._part(len(self._files))
        try:
            save_file(self._waiting, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path.name}: {error}") from error
        os.chmod(path, 0o666 & ~_umask())  # as any other file; safetensors keeps its own to the owner
        self._files.append(list(self._waiting))
        if len(self._files) > 1 or self._waiting_bytes > LARGEST_FILE // 2:
            print(f"export: {self._total_bytes / 1e9:,.1f} GB written", flush=True)
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index}.safetensors"

    def finish(self) -> int:
        """Write what is left; give the files their names, which tell how many there are. Returns their number."""
        self._flush()
        count = len(self._files)
        if count == 1:
            os.rename(self._part(0), self.folder / SINGLE_FILE)
            return 1
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._files):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._part(index), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        contents = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEX_FILE, contents)
        return count


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
