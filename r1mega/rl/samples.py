"""Completions on their way from the rank that generated them to the rank that trains on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.moe.replay import ReplayError


@dataclass
class Sample:
    """One completion, as training sees it: P prompt tokens, N tokens of the completion.

    Args:
        index: its place in the rollout: prompt by prompt, then completion by completion.
        prompt: token ids.
        tokens: token ids of the completion.
        advantage: of the whole completion, or ``[N]`` of each token.
        rollout_log_probs: ``[N]`` float32, as the engine reported them.
        in_loss: False leaves it out of the loss.
        experts: ``[P + N - 1, K]`` int16 by global layer, of the layers that this rank has.
        old_log_probs: ``[N]``, of the training forward under the weights of the rollout.
        ref_log_probs: ``[N]``, of the reference policy.
        values: ``[N]``, PPO: of the value head under the weights of the rollout.
        returns: ``[N]``, PPO: what the value head learns.
    """

    index: int
    prompt: list[int]
    tokens: list[int]
    advantage: float | Tensor
    rollout_log_probs: Tensor
    in_loss: bool = True
    experts: dict[int, Tensor] = field(default_factory=dict)
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    @property
    def num_inputs(self) -> int:
        """Tokens that go into the model: all but the last."""
        return len(self.prompt) + len(self.tokens) - 1


def random_order(num_samples: int, seed: int, rollout: int) -> list[int]:
    """A permutation of the completions of a rollout, from the seed and the rollout's number alone."""
    return numpy.random.default_rng([seed, rollout]).permutation(num_samples).tolist()


def exchange(mine: Sequence[Sample], owners: Sequence[int], group: ProcessGroup) -> list[Sample]:
    """Send each sample to its owner; one all-to-all of bytes. A collective call.

    Args:
        mine: samples of this rank.
        owners: the rank in ``group`` that each of them goes to.
        group: data-parallel ranks; their other coordinates are the same, so their layers are.

    Returns:
        What came, by index.
    """
    if group.size() == 1:
        return sorted(mine, key=lambda sample: sample.index)
    parcels: list[list[bytes]] = [[] for _ in range(group.size())]
    for sample, owner in zip(mine, owners, strict=True):
        parcels[owner].append(_to_bytes(sample))
    outgoing = torch.frombuffer(
        bytearray(b"".join(part for parcel in parcels for part in parcel)) or bytearray(1), dtype=torch.uint8
    )
    sizes = torch.tensor([sum(map(len, parcel)) for parcel in parcels])
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    outgoing, sizes = outgoing[: int(sizes.sum())].to(device), sizes.to(device)
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes, group=group)
    incoming = torch.empty(int(coming.sum()), dtype=torch.uint8, device=device)
    dist.all_to_all_single(incoming, outgoing, coming.tolist(), sizes.tolist(), group=group)
    return sorted(_from_bytes(incoming.cpu().numpy()), key=lambda sample: sample.index)


def share_experts(
    samples: Sequence[Sample],
    wanted: Sequence[Sequence[Iterable[int]]],
    recorded: Mapping[int, int],
    top_k: int,
    group: ProcessGroup,
) -> None:
    """Give each rank the expert choices that it wants of layers that another rank has recorded. A collective call.

    Every rank has the same samples, so all know the size of what each sends to each: one all-to-all without headers.

    Args:
        samples: the same on all ranks of ``group``, in the same order; their ``experts`` get the further layers.
        wanted: by rank, then by sample: the layers that this rank trains with this sample.
        recorded: the rank that has the choices of each layer.
        top_k: K.
        group: pipeline ranks.
    """
    me = group.rank()

    def parts(source: int, destination: int) -> list[tuple[Sample, int]]:
        pairs = zip(samples, wanted[destination], strict=True)
        return [(s, layer) for s, layers in pairs for layer in sorted(layers) if recorded[layer] == source]

    others = [rank for rank in range(group.size()) if rank != me]
    for sample, layer in (pair for rank in others for pair in parts(me, rank)):
        if layer not in sample.experts:
            raise ReplayError(f"layer {layer}: the rollout recorded no expert choices for it")
    going = [[s.experts[i].flatten() for s, i in parts(me, rank)] if rank != me else [] for rank in range(group.size())]
    coming = [parts(rank, me) if rank != me else [] for rank in range(group.size())]
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    nothing = torch.empty(0, dtype=torch.int16)
    outgoing = torch.cat([nothing, *(part for of_rank in going for part in of_rank)]).view(torch.uint8).to(device)
    sizes = [sum(2 * part.numel() for part in of_rank) for of_rank in going]
    their_sizes = [sum(2 * top_k * sample.num_inputs for sample, _ in of_rank) for of_rank in coming]
    incoming = torch.empty(sum(their_sizes), dtype=torch.uint8, device=device)
    dist.all_to_all_single(incoming, outgoing, their_sizes, sizes, group=group)
    arrived = [pair for of_rank in coming for pair in of_rank]
    split = incoming.cpu().view(torch.int16).split([top_k * sample.num_inputs for sample, _ in arrived])
    for (sample, layer), part in zip(arrived, split, strict=True):
        sample.experts[layer] = part.view(-1, top_k).clone()


_HEADER = 8  # int64: index, P, N, in_loss, number of layers, K, bits of the advantage (float64), 0


def _to_bytes(sample: Sample) -> bytes:
    layers = sorted(sample.experts)
    top_k = sample.experts[layers[0]].shape[1] if layers else 0
    advantage = numpy.float64(float(sample.advantage)).view(numpy.int64)
    header = [
        sample.index,
        len(sample.prompt),
        len(sample.tokens),
        int(sample.in_loss),
        len(layers),
        top_k,
        advantage,
        0,
    ]
    parts = [numpy.array([*header, *layers, *sample.prompt, *sample.tokens], dtype=numpy.int64)]
    parts.append(sample.rollout_log_probs.to(torch.float32).numpy())
    parts += [sample.experts[layer].contiguous().numpy() for layer in layers]
    packed = b"".join(part.tobytes() for part in parts)
    return packed + bytes(-len(packed) % 8)  # the next header begins on its own alignment


def _from_bytes(packed: numpy.ndarray) -> list[Sample]:
    found, at = [], 0

    def take(count: int, dtype: type) -> numpy.ndarray:
        nonlocal at
        size = count * numpy.dtype(dtype).itemsize
        at += size
        return packed[at - size : at].copy().view(dtype)

    while at < len(packed):
        index, num_prompt, num_tokens, in_loss, num_layers, top_k, advantage, _ = take(_HEADER, numpy.int64).tolist()
        layers, prompt, tokens = (take(n, numpy.int64).tolist() for n in (num_layers, num_prompt, num_tokens))
        log_probs = torch.from_numpy(take(num_tokens, numpy.float32))
        rows = num_prompt + num_tokens - 1
        experts = {i: torch.from_numpy(take(rows * top_k, numpy.int16)).view(rows, top_k) for i in layers}
        at += -at % 8
        value = float(numpy.int64(advantage).view(numpy.float64))
        found.append(Sample(index, prompt, tokens, value, log_probs, bool(in_loss), experts))
    return found
