"""What ranks tell each other between two forward passes: hidden states, drawn tokens, and whether anyone goes on."""

from __future__ import annotations

from collections import defaultdict, deque

import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.parallel_state import Layout, ParallelState

HIDDEN, TOKENS = 0, 1  # tags: each kind of message has its own order


class Links:
    """The messages of one pipeline. Sizes are known on both sides, so there are no headers.

    Args:
        state: the layout's groups.
        stage_to_rank: the pipeline rank of each stage.
    """

    def __init__(self, state: ParallelState, stage_to_rank: list[int]) -> None:
        self._group, self._rank, self._device = state.group("pp"), state.rank_in("pp"), state.device
        self._stage_to_rank = stage_to_rank
        # What is drawn is wanted by the hosts, and NCCL has no tags that would tell it from hidden states.
        self._host_group = self._group
        if state.device.type != "cpu" and state.size("pp") > 1:
            self._host_group, _ = dist.new_subgroups_by_enumeration(state.layout.groups("pp"), backend="gloo")
        self._local: dict[int, deque[Tensor]] = defaultdict(deque)  # hidden states that stay on this rank, by stage
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def send_hidden(self, stage: int, hidden: Tensor) -> None:
        """To the stage after ``stage``."""
        peer = self._stage_to_rank[stage + 1]
        if peer == self._rank:
            self._local[stage + 1].append(hidden)
        else:
            self._send(hidden.contiguous(), peer, HIDDEN, self._group)

    def receive_hidden(self, stage: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """What the stage before ``stage`` sent."""
        peer = self._stage_to_rank[stage - 1]
        if peer == self._rank:
            return self._local[stage].popleft()
        hidden = torch.empty(shape, dtype=dtype, device=self._device)
        self._group.recv([hidden], peer, HIDDEN).wait()
        return hidden

    def send_drawn(self, tokens: Tensor, log_probs: Tensor) -> None:
        """From the last stage to all other ranks of the pipeline. Ids are exact in float64."""
        peers = sorted(set(self._stage_to_rank) - {self._rank})
        if peers:
            both = torch.stack([tokens.to(torch.float64), log_probs.to(torch.float64)]).cpu()
            for peer in peers:
                self._send(both, peer, TOKENS, self._host_group)

    def receive_drawn(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """What the last stage drew: tokens and log-probabilities."""
        both = torch.empty(2, num_rows, dtype=torch.float64)
        self._host_group.recv([both], self._stage_to_rank[-1], TOKENS).wait()
        tokens, log_probs = both.to(self._device)
        return tokens.to(torch.int64), log_probs

    def release(self, kept: int) -> None:
        """Let go of all messages but the last ``kept``; waits until they are taken."""
        while len(self._sent) > kept:
            self._sent.popleft()[0].wait()

    def _send(self, tensor: Tensor, peer: int, tag: int, group: dist.ProcessGroup) -> None:
        self._sent.append((group.send([tensor], peer, tag), tensor))


class Agreement:
    """Whether any rank goes on that this rank's forward passes share messages with.

    Experts that are cut over data-parallel ranks take rows from all of them in each MoE layer, so these ranks must run
    the same number of passes, some of them without rows. Every ``every`` rounds they begin to add up whether they had
    rows in the round before, and ``later`` rounds on they read the sum: where it is zero, all of them stop at this very
    round. A rank without rows in a round never has any again, so nothing is cut off.

    No rank waits for another in a circle. Order all passes, and all these messages, by the time ``round * groups +
    group + stage`` at which a rank without delays would be there. A rank has begun the sum by the time of its first
    stage in round r, at most ``r * groups + stages - 1``, and ``groups >= stages``; it waits in round ``r + later``, at
    ``(r + later) * groups`` or after. So a wait is only for what has an earlier time, as a pass is.

    Args:
        state: the layout's groups.
        every: rounds from one sum to the next.
        later: rounds from the beginning of a sum to its reading, 1 or more.
    """

    def __init__(self, state: ParallelState, every: int = 8, later: int = 2) -> None:
        assert 1 <= later < every
        self._every, self._later, self._device = every, later, state.device
        sets = linked_ranks(state.layout)
        self.is_needed = len(sets[0]) > state.size("tp_pp")
        self._group: dist.ProcessGroup | None = None
        if self.is_needed:
            self._group, _ = dist.new_subgroups_by_enumeration(sets)
        self._sum: tuple[Tensor, dist.Work | None] | None = None

    def goes_on(self, round: int, had_rows: bool) -> bool:
        """Whether round ``round`` is run; ``had_rows``: whether this rank's replica had any in the round before."""
        if not self.is_needed:
            return had_rows or round == 0
        phase = round % self._every
        if phase == 0 and round > 0:
            total = torch.tensor([had_rows], dtype=torch.int32, device=self._device)
            self._sum = total, dist.all_reduce(total, group=self._group, async_op=True)
        elif phase == self._later and self._sum is not None:
            total, work = self._sum
            self._sum = None
            if work is not None:
                work.wait()
            return bool(total.item())
        return True


def linked_ranks(layout: Layout) -> list[list[int]]:
    """The sets of ranks whose forward passes share messages: those that tp, pp, ep and etp connect."""
    found: list[set[int]] = [{rank} for rank in range(layout.world_size)]
    for name in ("tp", "pp", "ep", "etp"):
        for ranks in layout.groups(name):
            joined = set().union(*(part for part in found if not part.isdisjoint(ranks)))
            found = [part for part in found if part.isdisjoint(ranks)] + [joined]
    return sorted(sorted(part) for part in found)
