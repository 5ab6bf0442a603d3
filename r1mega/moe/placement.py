"""Which rank holds which experts, by measured load, with further copies of the busiest (as DeepSeek's EPLB does).

A pure function of the load. Each expert has one copy at least; further ones go to whichever expert has the highest load
a copy; copies are packed onto ranks, as many on each, so that the busiest rank has as little as possible. Where
group-limited routing relies on a group of experts being on one node, whole groups are packed onto nodes first, and each
node gets its own copies. A copy takes an equal share of its expert's tokens.

    placement = place_experts(load, num_ranks=8, slots_per_rank=5)
    placement.experts            # [[3, 17, 0, 30, 9], ...] of each rank
    gain(load, placement)        # max over mean of the ranks' load: of experts in order, and of this placement
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """What :func:`place_experts` decides.

    Args:
        experts: for each rank the expert in each of its slots.
    """

    experts: tuple[tuple[int, ...], ...]

    @property
    def copies(self) -> list[int]:
        """How many copies each expert has."""
        counted = Counter(expert for of_rank in self.experts for expert in of_rank)
        return [counted[expert] for expert in range(max(counted) + 1)]

    def load_of_ranks(self, load: Sequence[float]) -> list[float]:
        """What each rank has to do where ``load[e]`` tokens go to expert e."""
        copies = self.copies
        return [sum(load[expert] / copies[expert] for expert in of_rank) for of_rank in self.experts]

    def slots_of(self, experts_TK: Tensor) -> Tensor:
        """The slot of each choice, ``[T, K]``: token t takes copy ``t mod copies``. Slots are counted rank by rank.

        A dispatcher of as many experts as there are slots brings the tokens there.
        """
        copies = self.copies
        slots: list[list[int]] = [[] for _ in copies]
        for slot, expert in enumerate(expert for of_rank in self.experts for expert in of_rank):
            slots[expert].append(slot)
        most = max(copies)
        table = torch.tensor([(of_expert * most)[:most] for of_expert in slots], device=experts_TK.device)
        tokens = torch.arange(experts_TK.shape[0], device=experts_TK.device).unsqueeze(1)
        return table[experts_TK, tokens % torch.tensor(copies, device=experts_TK.device)[experts_TK]]


def in_order(num_experts: int, num_ranks: int) -> Placement:
    """Experts side by side, each once: what a layer has without measurements."""
    return Placement(tuple(tuple(part) for part in _parts(list(range(num_experts)), num_ranks)))


def place_experts(
    load: Sequence[float], num_ranks: int, slots_per_rank: int, num_groups: int = 1, num_nodes: int = 1
) -> Placement:
    """Decide which experts each rank holds.

    Args:
        load: tokens of each expert, as measured.
        num_ranks: ranks that share the experts; those of a node stand side by side.
        slots_per_rank: experts that a rank holds; ``num_ranks * slots_per_rank`` beyond the number of experts are
            further copies.
        num_groups: groups of neighbouring experts that stay on one node each.
        num_nodes: nodes; 1 lets every expert go anywhere.

    Raises:
        ValueError: too few slots, numbers that do not divide each other, or a load that nothing can have.
    """
    num_experts = len(load)
    for name, count in (("load", num_experts), ("num_ranks", num_ranks), ("num_groups", num_groups),
                        ("num_nodes", num_nodes)):  # fmt: skip
        if count < 1:
            raise ValueError(f"{name}: there must be 1 at least, not {count}")
    for expert, tokens in enumerate(load):
        if not 0 <= tokens < math.inf:
            raise ValueError(f"load[{expert}]={tokens}: must be a finite number, 0 at least")
    for name, number, divisor in (
        ("experts in groups", num_experts, num_groups),
        ("groups on nodes", num_groups if num_nodes > 1 else num_nodes, num_nodes),
        ("ranks on nodes", num_ranks, num_nodes),
    ):
        if number % divisor:
            raise ValueError(f"{name}: {divisor} does not divide {number}")
    if not num_experts <= num_ranks * slots_per_rank <= num_experts * num_ranks // num_nodes:
        raise ValueError(f"{num_ranks} ranks with {slots_per_rank} slots cannot hold {num_experts} experts, each once")
    groups = _parts(list(range(num_experts)), num_groups if num_nodes > 1 else num_nodes)
    of_nodes = pack([sum(load[expert] for expert in group) for group in groups], num_nodes)
    ranks_of_node, found = num_ranks // num_nodes, []
    for of_node in of_nodes:
        experts = [expert for group in of_node for expert in groups[group]]
        copies = replicate([load[expert] for expert in experts], ranks_of_node * slots_per_rank, ranks_of_node)
        slots = [expert for expert, count in zip(experts, copies, strict=True) for _ in range(count)]
        shares = [load[expert] / count for expert, count in zip(experts, copies, strict=True) for _ in range(count)]
        found += [tuple(slots[slot] for slot in of_rank) for of_rank in pack(shares, ranks_of_node, slots)]
    return Placement(tuple(found))


def replicate(load: Sequence[float], num_slots: int, most: int) -> list[int]:
    """Copies of each expert, ``num_slots`` in all, with the least load of the busiest copy; ``most`` of one expert."""
    copies = [1] * len(load)
    for _ in range(num_slots - len(load)):
        open_ = (expert for expert in range(len(load)) if copies[expert] < most)
        copies[max(open_, key=lambda expert: (load[expert] / copies[expert], -copies[expert]))] += 1
    return copies


def pack(weights: Sequence[float], num_bins: int, kinds: Sequence[int] | None = None) -> list[list[int]]:
    """Items into bins, as many in each, with a low weight of the fullest: heaviest first, then exchanges.

    Args:
        weights: of the items; ``num_bins`` divides their number.
        num_bins: how many bins.
        kinds: items of one kind go to different bins, if there are not more of them than bins.

    Returns:
        The items of each bin.
    """
    size = len(weights) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    total = [0.0] * num_bins
    alike = Counter(kinds or ())
    for item in sorted(range(len(weights)), key=lambda item: (-alike[kinds[item]] if kinds else 0, -weights[item])):
        free = [b for b in range(num_bins) if len(bins[b]) < size]
        other = [b for b in free if kinds is None or all(kinds[i] != kinds[item] for i in bins[b])]
        if not other and kinds is not None:
            other = _make_room(bins, total, weights, kinds, item, free)
        best = min(other or free, key=lambda b: total[b])
        bins[best].append(item)
        total[best] += weights[item]
    while _exchange(bins, total, weights, kinds):
        pass
    return bins


def _make_room(
    bins: list[list[int]], total: list[float], weights: Sequence[float], kinds: Sequence[int], item: int,
    free: Sequence[int],
) -> list[int]:  # fmt: skip
    """Where every free bin has one of the item's kind, a full one without gives something to a free one; that bin.

    There is such a pair as long as the kinds of each bin differ: the full bin has more kinds than the free one.
    """
    best: tuple[float, int, int, int] | None = None
    for full in (b for b in range(len(bins)) if all(kinds[i] != kinds[item] for i in bins[b])):
        for given in bins[full]:
            for b in free:
                top = max(total[b] + weights[given], total[full] - weights[given] + weights[item])
                if all(kinds[i] != kinds[given] for i in bins[b]) and (best is None or top < best[0]):
                    best = top, full, given, b
    if best is None:
        return []
    _, full, given, b = best
    bins[full].remove(given)
    bins[b].append(given)
    total[full] -= weights[given]
    total[b] += weights[given]
    return [full]


def _exchange(bins: list[list[int]], total: list[float], weights: Sequence[float], kinds: Sequence[int] | None) -> bool:
    """Swap the two items that lighten the fullest bin most; whether there were any."""
    fullest = max(range(len(bins)), key=total.__getitem__)
    best, best_top = None, total[fullest] * (1 - 1e-12)
    for other in range(len(bins)):
        for i, mine in enumerate(bins[fullest]):
            for j, theirs in enumerate(bins[other]):
                gained = weights[mine] - weights[theirs]
                top = max(total[fullest] - gained, total[other] + gained)
                if top < best_top and _may_swap(bins, kinds, fullest, i, other, j):
                    best, best_top = (other, i, j, gained), top
    if best is None:
        return False
    other, i, j, gained = best
    bins[fullest][i], bins[other][j] = bins[other][j], bins[fullest][i]
    total[fullest] -= gained
    total[other] += gained
    return True


def _may_swap(bins: list[list[int]], kinds: Sequence[int] | None, a: int, i: int, b: int, j: int) -> bool:
    if kinds is None:
        return True
    moved = ((bins[a][i], bins[b], j), (bins[b][j], bins[a], i))
    return all(kinds[item] != kinds[k] for item, into, out in moved for n, k in enumerate(into) if n != out)


def _parts(items: list[int], count: int) -> list[list[int]]:
    size = len(items) // count
    return [items[start : start + size] for start in range(0, count * size, size)]


def max_over_mean(values: Sequence[float]) -> float:
    """1 is even; 1, too, where there is nothing at all."""
    return max(values) * len(values) / sum(values) if sum(values) else 1.0


def gain(load: Sequence[float], placement: Placement) -> tuple[float, float]:
    """Max over mean of the ranks' load, of experts in order and of ``placement``.

    ``load`` may be another than the one that decided the placement: that of later steps, to see how well it keeps.
    """
    before = in_order(len(load), len(placement.experts)).load_of_ranks(load)
    return max_over_mean(before), max_over_mean(placement.load_of_ranks(load))
