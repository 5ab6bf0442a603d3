"""Completions on their way from the rank that generated them to the rank that trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass
class Sample:
    """One completion, as training sees it: P prompt tokens, N tokens of the completion.

    Args:
        index: its place in the rollout: prompt by prompt, then completion by completion.
        prompt: token ids.
        tokens: token ids of the completion.
        advantage: of the whole completion.
        rollout_log_probs: ``[N]`` float32, as the engine reported them.
        in_loss: False leaves it out of the loss.
        experts: ``[P + N - 1, K]`` int16 by global layer, of the layers that this rank has.
        old_log_probs: ``[N]``, of the training forward under the weights of the rollout.
        ref_log_probs: ``[N]``, of the reference policy.
    """

    index: int
    prompt: list[int]
    tokens: list[int]
    advantage: float
    rollout_log_probs: Tensor
    in_loss: bool = True
    experts: dict[int, Tensor] = field(default_factory=dict)
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None

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


_HEADER = 8  # int64: index, P, N, in_loss, number of layers, K, bits of the advantage (float64), 0


def _to_bytes(sample: Sample) -> bytes:
    layers = sorted(sample.experts)
    top_k = sample.experts[layers[0]].shape[1] if layers else 0
    advantage = numpy.float64(sample.advantage).view(numpy.int64)
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
