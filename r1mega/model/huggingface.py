"""Starting from a Hugging Face checkpoint: which model it is, is it whole, and this rank's part of its weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1mega.config import ConfigError, ModelConfig, MoEConfig
from r1mega.model.huggingface_config import CONFIG_FILE, from_huggingface, read_config
from r1mega.model.huggingface_difference import TRAINING_SETTINGS, first_difference
from r1mega.model.huggingface_files import Entry, TensorReader, check_entries, read_entries
from r1mega.model.huggingface_names import VALUE_HEAD, to_huggingface_name

if TYPE_CHECKING:
    from torch import Tensor, nn


def model_config_from(path: str | Path) -> ModelConfig:
    """The model of the checkpoint folder ``path``, after a check that the folder is whole. No torch, no process group.

    A checkpoint whose ``config.json`` speaks of MTP layers but which holds none of their weights (transformers saves
    such ones) is a model without MTP layers.

    Raises:
        ConfigError: one line: another architecture, a file that is missing or cut short, a tensor that does not fit.
    """
    return _inspect(Path(path))[0]


def _inspect(folder: Path) -> tuple[ModelConfig, dict[str, Entry]]:
    """The model of a checkpoint and where each tensor is, both checked."""
    config = from_huggingface(read_config(folder), source=str(folder / CONFIG_FILE))
    entries = read_entries(folder)
    layers = {int(found[1]) for name in entries if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    if config.num_mtp_layers and max(layers, default=0) < config.num_layers:
        config = dataclasses.replace(config, num_mtp_layers=0)
    check_entries(entries, config, folder)
    return config, entries


def resolve_model_config(config: ModelConfig) -> ModelConfig:
    """The settings of a run that may start from ``config.checkpoint``.

    Where the settings describe no model of their own (all that decides weights or logits has its default), the model is
    the checkpoint's; otherwise the two must agree. Settings of the training (losses, balance, capacity) stay the run's.

    Raises:
        ConfigError: as :func:`model_config_from`, or naming the first setting that differs.
    """
    if config.checkpoint is None:
        return config
    there = model_config_from(config.checkpoint)
    if first_difference(config, ModelConfig()) is None:
        return _with_training_settings(there, config)
    difference = first_difference(config, there)
    if difference is not None:
        name, ours, theirs = difference
        raise ConfigError(f"{name}={ours}: must be {theirs}, as in the checkpoint {config.checkpoint}, or be left out")
    return config


def _with_training_settings(model: ModelConfig, run: ModelConfig) -> ModelConfig:
    """``model`` with the settings of ``run`` that are no part of a checkpoint."""
    defaults = ModelConfig()
    # What the checkpoint does know (its context, its initial spread) gives way only to what the run has set.
    known = {name for name in ("init_std", "max_position") if getattr(run, name) == getattr(defaults, name)}

    def training(config: ModelConfig | MoEConfig) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(config)} & TRAINING_SETTINGS - known
        return {name: getattr(config, name) for name in names}

    return dataclasses.replace(model, **training(run), moe=dataclasses.replace(model.moe, **training(run.moe)))


def load_huggingface(
    stage: nn.Module, config: ModelConfig, path: str | Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Fill the local shards of a stage's parameters, and its router biases, from a checkpoint.

    Each rank reads the parts that it holds and nothing else, whatever the layout: of an expert that lives elsewhere not
    a byte. The stage may be on any device and in any floating type; FSDP may have cut it.

    Args:
        stage: built by :func:`r1mega.model.stage.build_stage`.
        config: of the model; the checkpoint's own.
        path: the checkpoint folder.
        progress: called with (tensors done, tensors in all).

    Raises:
        ConfigError: the checkpoint is not one of this model, or not whole. Nothing has been changed then.
    """
    import torch

    from r1mega.kernels.parameter import local
    from r1mega.model.init import local_matrices, local_slices
    from r1mega.moe.router import Router

    folder = Path(path)
    there, entries = _inspect(folder)
    difference = first_difference(config, there)
    if difference is not None:
        name, ours, theirs = difference
        raise ConfigError(f"{name}={ours}: must be {theirs}, as in the checkpoint {path}")
    tensors = named_tensors(stage)
    with TensorReader(folder, entries) as reader, torch.no_grad():
        for done, (name, tensor) in enumerate(tensors.items(), start=1):
            shard, slices = local(tensor), local_slices(tensor)
            if name == VALUE_HEAD:
                shard.zero_()  # no checkpoint has one: it begins by expecting nothing
            elif shard.numel():
                for here, index in local_matrices(slices):
                    shard[here].copy_(reader.read(to_huggingface_name(name, config, index), slices[-2:]))
            if progress is not None:
                progress(done, len(tensors))
    for module in stage.modules():
        if isinstance(module, Router):
            module.get_buffer("tokens_per_expert").zero_()


def named_tensors(stage: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a stage by name: what a checkpoint holds of it."""
    saved = set(stage.state_dict())
    buffers = {name: buffer for name, buffer in stage.named_buffers() if name in saved}
    return dict(stage.named_parameters()) | buffers
