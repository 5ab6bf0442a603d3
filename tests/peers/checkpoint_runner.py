"""What r1mega says to some tokens, from a Hugging Face checkpoint, under any layout; transformers is not imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config import ParallelConfig
from r1mega.data.batch import Batch
from r1mega.kernels.parameter import local
from r1mega.model.blocks import place_blocks
from r1mega.model.huggingface import load_huggingface, model_config_from, named_tensors
from r1mega.model.huggingface_files import TensorReader
from r1mega.model.init import local_slices
from r1mega.model.stage import build_stage
from r1mega.optim.gradients import Gradients
from r1mega.parallel_state import Layout, ParallelState
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.pipeline.schedules import make_table
from r1mega.train.sharding import named_shards, reduce_gradients, shard


@dataclass
class Answer:
    """What a model says.

    Args:
        logits: ``[b, s, vocabulary]``.
        loss: the sum that is differentiated.
        gradients: by r1mega's names.
        predictions: logits of the main model and of each MTP layer, where they were asked for.
    """

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    predictions: list[Tensor] = field(default_factory=list)


def make_batch(tokens: Tensor, labels: Tensor | None, rows: slice = slice(None)) -> Batch:
    """r1mega's form of tokens and transformers' labels, which are not shifted and have -100 for what does not count."""
    if labels is None:
        return Batch(tokens[rows], None, None, 0, tokens.shape[0])
    following = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
    mask = torch.cat([labels[:, 1:] != -100, torch.zeros_like(tokens[:, :1], dtype=torch.bool)], dim=1)
    return Batch(tokens[rows], following[rows], mask[rows], int(mask.sum()), tokens.shape[0])


def answer_on_rank(
    rank: int, world_size: int, path: Path, parallel: ParallelConfig, tokens: Tensor, labels: Tensor
) -> Answer | None:
    """Load this rank's part and run all together, cut as a training run is; rank 0 gets the whole answer."""
    state = ParallelState(Layout.from_config(parallel, world_size))
    config = model_config_from(path)
    number, length = state.rank_in("pp"), tokens.shape[1]
    placed = place_blocks(config, parallel, length, parallel.pp)
    stage = build_stage(config, state, placed[number], torch.float32)
    shard(stage, state, torch.float32)
    stage.to_empty(device="cpu")
    load_huggingface(stage, config, path)
    parameters = named_shards([stage])
    gradients = Gradients(parameters, state)
    group = state.group("pp") if parallel.pp > 1 else None
    per_rank = tokens.shape[0] // state.size("dp")
    first = state.rank_in("dp") * per_rank

    def execute(num_microbatches: int, labels: Tensor | None) -> dict[str, Tensor]:
        table = make_table(parallel.schedule, parallel.pp, num_microbatches, parallel.chunks)
        executor = PipelineExecutor(table, {number: stage}, group, lambda _: reduce_gradients(stage))
        size = per_rank // num_microbatches
        rows = [slice(start, start + size) for start in range(first, first + per_rank, size)]
        return executor.run([make_batch(tokens, labels, each) for each in rows], forward_only=labels is None)

    logits = execute(1, None).get("logits")
    predictions: list[Tensor] = []
    if stage.lm_head is not None:
        stage.lm_head.register_forward_hook(lambda module, inputs, output: predictions.append(output.detach().clone()))
    metrics = execute(per_rank, labels)
    gradients.finish()
    num_depths = 1 + config.num_mtp_layers
    depths = [torch.cat(predictions[depth::num_depths]) for depth in range(num_depths)] if predictions else []
    loss = metrics.get("loss", torch.zeros(())) + config.mtp_loss_coefficient * metrics.get("mtp_loss", torch.zeros(()))
    dist.all_reduce(loss)
    place = (state.rank_in("dp"), state.rank_in("tp"))
    merged = merge_shards({name: parameter.grad for name, parameter in parameters})
    everyone: list = [None] * world_size
    dist.gather_object((place, logits, depths), everyone if rank == 0 else None)
    if rank != 0:
        return None
    last = {place: (whole, parts) for place, whole, parts in everyone if parts}
    shape = (*tokens.shape, config.vocab_size)
    joined = torch.cat([last[dp, 0][0] for dp in range(state.size("dp"))]).view(shape)
    per_depth = []
    for depth in range(num_depths):
        parts = [[last[dp, tp][1][depth] for tp in range(parallel.tp)] for dp in range(state.size("dp"))]
        per_depth.append(torch.cat([torch.cat(part, dim=1) for part in parts]).view(shape))
    return Answer(joined, loss, merged, per_depth)


def merge_shards(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on rank 0 from the shards of all ranks; elements that nobody holds are NaN."""
    shards = {name: (tuple(t.shape), local_slices(t), local(t).detach().clone()) for name, t in mine.items()}
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.gather_object(shards, everyone if dist.get_rank() == 0 else None)
    merged: dict[str, Tensor] = {}
    for part in everyone:
        for name, (shape, slices, values) in part.items():
            merged.setdefault(name, torch.full(shape, torch.nan))[slices] = values
    return merged


def reads_on_rank(
    rank: int, world_size: int, path: Path, parallel: ParallelConfig
) -> tuple[dict[str, int], dict[str, tuple[tuple[slice, ...], Tensor]], dict[str, int]]:
    """How many numbers of each tensor of the checkpoint this rank reads; what it holds then; where it stands."""
    state = ParallelState(Layout.from_config(parallel, world_size))
    config = model_config_from(path)
    stage = build_stage(config, state, place_blocks(config, parallel, 4, 1)[0], torch.float32, "cpu")
    read: dict[str, int] = {}
    plain = TensorReader.read

    def recording(reader: TensorReader, name: str, slices: tuple[slice, ...]) -> Tensor:
        part = plain(reader, name, slices)
        read[name] = read.get(name, 0) + part.numel()
        return part

    TensorReader.read = recording
    try:
        load_huggingface(stage, config, path)
    finally:
        TensorReader.read = plain
    held = {name: (local_slices(tensor), local(tensor).detach()) for name, tensor in named_tensors(stage).items()}
    return read, held, state.coordinates
