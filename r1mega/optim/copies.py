"""Tensors of which several pipeline stages hold a copy: which they are, and their sums over the copies.

An embedding table is copied to the stages of a tied head or an MTP layer; a bidirectional schedule (DualPipe) copies
every parameter, to another rank or to the same one. A copy has the same name everywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.parallel_state import ParallelState


class Copies:
    """The copies of one pipeline. Building it is a collective call over the world.

    Args:
        names: of the parameters and routers of this rank's stages; a name may come twice.
        state: the layout's groups. Every pipeline has the same names on the same stages.
    """

    def __init__(self, names: Iterable[str], state: ParallelState) -> None:
        mine = list(names)
        everyone: list[list[str]] = [mine]
        if state.size("pp") > 1:
            everyone = [[] for _ in range(state.size("pp"))]
            dist.all_gather_object(everyone, mine, group=state.group("pp"))
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, held in enumerate(everyone):
            for name in dict.fromkeys(held):
                holders[name].append(rank)
        self._rank = state.rank_in("pp")
        self._holders = {name: tuple(ranks) for name, ranks in holders.items()}
        self._groups = _groups(sorted(set(self._holders.values())), state)

    def is_first_holder(self, name: str) -> bool:
        """Whether this is the lowest pipeline rank that holds ``name``: the one that counts it."""
        return self._holders[name][0] == self._rank

    @torch.no_grad()
    def sum(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Sum the copies of each tensor, in place; a collective call of the ranks that hold copies of the same names.

        Args:
            named: tensors of one type by name, all of this rank or at least all that have copies.
        """
        by_holders: dict[tuple[int, ...], dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for name, tensor in named:
            by_holders[self._holders[name]][name].append(tensor)
        for ranks in sorted(by_holders):
            self._sum_together(by_holders[ranks], self._groups.get(ranks))

    def _sum_together(self, named: dict[str, list[Tensor]], group: ProcessGroup | None) -> None:
        if group is None:
            named = {name: copies for name, copies in named.items() if len(copies) > 1}
        if not named:
            return
        # in the order of the names, which is the same on all ranks
        copies = [named[name] for name in sorted(named)]
        flat = torch.cat([torch.stack(each).sum(0).reshape(-1) for each in copies])
        if group is not None:
            dist.all_reduce(flat, group=group)
        parts = flat.split([each[0].numel() for each in copies])
        targets = [(copy, part.view_as(copy)) for each, part in zip(copies, parts, strict=True) for copy in each]
        torch._foreach_copy_([copy for copy, _ in targets], [part for _, part in targets])


def _groups(holders: list[tuple[int, ...]], state: ParallelState) -> dict[tuple[int, ...], ProcessGroup]:
    """This rank's process group for each set of pipeline ranks that share a tensor."""
    found = {}
    for ranks in holders:
        if len(ranks) < 2:
            continue
        for pipeline in state.layout.groups("pp"):
            members = [pipeline[rank] for rank in ranks]
            group = dist.new_group(members)
            if state.rank in members:
                found[ranks] = group
    return found
