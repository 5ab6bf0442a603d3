"""The weights as they are in training, as a Hugging Face folder that an engine outside of it reads."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from r1mega.config import Config
from r1mega.kernels.parameter import local
from r1mega.model.export import BIAS, FileWriter, as_stored, huggingface_parts, stored_type, write_json, write_settings
from r1mega.model.huggingface_files import INDEX_FILE, check_entries, read_entries
from r1mega.parallel_state import ParallelState
from r1mega.train.sharding import reshard

_EMBEDDING = "embed_tokens.weight"  # the one tensor that several stages may have


class WeightFolder:
    """Writes the weights into a folder that all ranks see.

    Shards are gathered tensor by tensor within each pipeline stage. One rank of each place in the pipeline writes what
    its stages have into files of its own; rank 0 puts them together and checks that every tensor of the model is there.

    Args:
        config: the job.
        state: the layout's groups.
        stages: this rank's stages by number, of one copy of the model.
        path: the folder; it and what is in it are replaced.
    """

    def __init__(self, config: Config, state: ParallelState, stages: Mapping[int, nn.Module], path: Path) -> None:
        self.path, self._config, self._state, self._stages = path, config, state, stages
        self._digest = b""

    def has_changed(self) -> bool:
        """Whether any rank's weights are others than at the last :meth:`write`. A collective call."""
        changed = torch.tensor([int(self._compute_digest() != self._digest)], device=self._state.device)
        dist.all_reduce(changed, op=dist.ReduceOp.MAX)
        return bool(changed.item())

    def write(self) -> None:
        """A collective call. Raises OSError where a file cannot be written, and ConfigError as ``r1mega export``."""
        if self._state.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            write_settings(self._config, self.path)
        dist.barrier()
        self._write_part(self._part(self._state.rank_in("pp")))
        dist.barrier()
        if self._state.rank == 0:
            self._put_together()
        self._digest = self._compute_digest()

    @torch.no_grad()
    def _write_part(self, folder: Path) -> None:
        """What this rank's stages have."""
        writes = self._state.rank_in("tp_dp_cp") == 0
        if writes:
            folder.mkdir()
            files = FileWriter(folder)
        dtype, model = getattr(torch, stored_type(self._config)), as_stored(self._config.model)
        for name, tensor in self._tensors():
            whole = tensor.detach().to(torch.float32 if name.endswith(BIAS) else dtype)
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            if writes:
                for hf_name, part in huggingface_parts(name, whole.cpu(), model, dtype):
                    files.add(hf_name, part)
        if writes:
            files.finish()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and saved buffers by name, in the same order on all ranks of a stage."""
        adds_bias = as_stored(self._config.model).moe.score_bias and not self._config.model.moe.score_bias
        for number, stage in sorted(self._stages.items()):
            reshard(stage)
            saved = stage.state_dict().keys()
            for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
                if name not in saved or (name == _EMBEDDING and number > 0):
                    continue
                yield name, tensor
                if adds_bias and name.endswith(".mlp.gate.weight"):
                    yield name.removesuffix("weight") + BIAS, torch.zeros(tensor.shape[0])

    def _put_together(self) -> None:
        """Give the files of all pipeline ranks their names, write the index, and check."""
        found: list[tuple[Path, list[str]]] = []
        for rank in range(self._state.size("pp")):
            by_file: dict[str, list[str]] = {}
            for name, entry in read_entries(self._part(rank)).items():
                by_file.setdefault(entry.file, []).append(name)
            found += [(self._part(rank) / file, names) for file, names in by_file.items()]
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(found, start=1):
            file = f"model-{number:05d}-of-{len(found):05d}.safetensors"
            os.replace(path, self.path / file)
            weight_map |= dict.fromkeys(names, file)
        for rank in range(self._state.size("pp")):
            shutil.rmtree(self._part(rank))
        size = sum((self.path / file).stat().st_size for file in set(weight_map.values()))
        write_json(self.path / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": weight_map})
        check_entries(read_entries(self.path), as_stored(self._config.model), self.path)

    def _part(self, rank: int) -> Path:
        return self.path / f"part-{rank}"

    def _compute_digest(self) -> bytes:
        digest = hashlib.blake2b()
        for _, tensor in self._tensors():
            digest.update(local(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.digest()
