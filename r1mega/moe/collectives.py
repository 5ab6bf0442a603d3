"""The dispatcher's messages: all-to-all over unequal numbers of rows, and the counts that make it possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.collectives import all_gather


@dataclass
class Splits:
    """How many rows go where.

    Args:
        sent: ``[ep]`` rows that go to each rank.
        received: ``[ep]`` rows that come from each rank.
        gathered: ``[etp]`` rows that each rank of ``etp`` received.
        counts: ``[local experts]`` rows of each local expert.
        counts_on_device: the same as a tensor on a GPU, whose products read it there; None on a CPU.
    """

    sent: list[int]
    received: list[int]
    gathered: list[int]
    counts: list[int]
    counts_on_device: Tensor | None = None


class Counts:
    """The counts of one layer, exchanged once for all its chunks of tokens; the host reads them when first asked.

    This is where a step waits for a GPU if ``ep`` or ``etp`` has more than one rank, once for each layer and
    microbatch: NCCL wants the numbers of rows that are sent and received on the host.

    Args:
        sent: ``[ep, chunks, 1 + local experts]`` int64: rows that go to each rank, and to each of its experts.
        ep: expert-parallel group.
        etp: the ranks that hold parts of the same experts; None where there is only this one.
    """

    def __init__(self, sent: Tensor, ep: ProcessGroup, etp: ProcessGroup | None) -> None:
        self._sent, self._etp = sent, etp
        self._received, self._work = all_to_all(sent, [1] * ep.size(), [1] * ep.size(), ep)
        self._host: list | None = None
        self._on_device: Tensor | None = None  # [chunks, local experts], rows that come for each; on a GPU only

    def of_chunk(self, chunk: int) -> Splits:
        """What one chunk of the tokens sends and receives."""
        if self._host is None:
            if self._work is not None:
                self._work.wait()
            received = self._received
            of_etp = received.unsqueeze(0) if self._etp is None else all_gather(received.unsqueeze(0), self._etp)
            self._host = torch.cat([self._sent.unsqueeze(0), of_etp]).tolist()
            if received.is_cuda:
                self._on_device = of_etp[..., 1:].sum((0, 1))
        sent, *of_etp_ranks = ([counts[chunk] for counts in of_rank] for of_rank in self._host)
        mine = of_etp_ranks[0 if self._etp is None else self._etp.rank()]
        all_counts = [counts for of_rank in of_etp_ranks for counts in of_rank]
        arriving = [sum(column) for column in zip(*all_counts, strict=True)]
        return Splits(
            [counts[0] for counts in sent],
            [counts[0] for counts in mine],
            [sum(counts[0] for counts in of_rank) for of_rank in of_etp_ranks],
            arriving[1:],
            None if self._on_device is None else self._on_device[chunk],
        )


class InFlight:
    """An all-to-all under way."""

    def __init__(
        self, received: Tensor, work: dist.Work | None, finish: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> None:
        self._received, self._work, self._finish = received, work, finish

    def wait(self) -> tuple[Tensor, ...]:
        """What came; on a GPU the stream waits and not the host."""
        if self._work is not None:
            self._work.wait()
        return self._finish(self._received)


def start_exchange(
    rows: Tensor,
    receive: Sequence[int],
    send: Sequence[int],
    group: ProcessGroup,
    finish: Callable[[Tensor], tuple[Tensor, ...]],
) -> InFlight:
    """Send ``send[r]`` rows to each rank r, receive ``receive[r]``; waiting for it gives ``finish(received)``."""
    return InFlight(*all_to_all(rows, receive, send, group), finish)


def all_to_all(
    rows: Tensor, receive: Sequence[int], send: Sequence[int], group: ProcessGroup
) -> tuple[Tensor, dist.Work | None]:
    """Start to send and receive; the rows are there once the work has been waited for."""
    if group.size() == 1:
        return rows, None
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    # Sends and receives of its own were measured: on gloo they take no less CPU time inside a layer.
    work = dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group, async_op=True)
    return received, work


# gloo has neither an all-gather nor a reduce-scatter of unequal parts, so both are an all-to-all.
def gather(rows: Tensor, gathered: Sequence[int], group: ProcessGroup) -> Tensor:
    """The rows of all ranks of ``group``, of which rank r has ``gathered[r]``."""
    size = group.size()
    sent = [rows.shape[0]] * size
    return start_exchange(rows.repeat(size, 1), gathered, sent, group, lambda rows: (rows,)).wait()[0]


def scatter(rows: Tensor, gathered: Sequence[int], group: ProcessGroup) -> Tensor:
    """``[ranks, rows of this rank, ...]``: what each rank of ``group`` has for this one, still to be summed."""
    size, mine = group.size(), gathered[group.rank()]
    (received,) = start_exchange(rows, [mine] * size, gathered, group, lambda rows: (rows,)).wait()
    return received.unflatten(0, (size, mine))
