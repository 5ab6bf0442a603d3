"""Metrics of a GRPO step, added up over ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from r1mega.parallel_state import ParallelState
from r1mega.rl.evaluation import reflection_words
from r1mega.rl.loss_metrics import MAXIMUM

if TYPE_CHECKING:
    from r1mega.rl.experience import Experience, Group


class Measures:
    """Sums and counts by name; each rank adds what it alone knows."""

    def __init__(self, state: ParallelState) -> None:
        self._state = state
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}

    def add(self, name: str, value: float, count: float = 1) -> None:
        """To a mean."""
        self._sums[name] += value
        self._counts[name] += count

    def total(self, name: str, value: float) -> None:
        """To a sum."""
        self._sums[name] += value
        self._counts.setdefault(name, 0.0)

    def same(self, name: str, value: float) -> None:
        """A number that all ranks know; the mean over what is added on one."""
        if self._state.rank == 0:
            self.add(name, value)

    def loss(self, metrics: Mapping[str, Tensor]) -> None:
        """Those of :func:`r1mega.rl.loss_metrics.loss_metrics`."""
        count = float(metrics["num_tokens"])
        for name, value in metrics.items():
            if name.endswith(MAXIMUM):
                self._maxima[name] = max(self._maxima.get(name, float(value)), float(value))
            elif name != "num_tokens":
                self.add(name, float(value), count)

    def means(self) -> dict[str, float]:
        """Over all ranks, the same on each. A collective call."""
        mine = dict(self._sums), dict(self._counts), self._maxima
        everyone = [mine] * self._state.layout.world_size
        if len(everyone) > 1:
            dist.all_gather_object(everyone, mine)
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        found: dict[str, float] = {}
        for their_sums, their_counts, their_maxima in everyone:
            for name, value in their_sums.items():
                sums[name] += value
                counts[name] += their_counts[name]
            for name, value in their_maxima.items():
                found[name] = max(found.get(name, value), value)
        return {name: value / counts[name] if counts[name] else value for name, value in sums.items()} | found


def of_groups(measures: Measures, groups: Sequence[Group], experience: Experience) -> None:
    """Rewards, lengths and words of a rollout; known on the first rank of each model replica."""
    if not experience.is_leader:
        return
    for group in groups:
        measures.add("reward_std", group.std)
        measures.add("flat_groups", group.is_flat)
        for completion, total, score in zip(group.completions, group.totals, group.scores, strict=True):
            measures.add("reward", total)
            for name, value in score.by_name.items():
                measures.add(f"reward/{name}", value)
                measures.total(f"reward_failures/{name}", name in score.failures)
            measures.add("response_length", len(completion.tokens))
            measures.add("truncated", not completion.finished)
            measures.add("reflection_words", reflection_words([experience.decode(completion)]))
