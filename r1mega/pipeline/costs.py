"""How long the actions of a schedule take: what the simulator needs to know of a model and its machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from r1mega.pipeline.actions import Kind

Cost = float | Sequence[float]

PER_STAGE = ("forward", "backward_input", "backward_weight", "recompute", "reduce", "optimizer_step")


@dataclass(frozen=True)
class Costs:
    """Times of one microbatch, in any one unit. Raises ValueError for what is no time, naming the field.

    A cost is one number, the same for every stage, or one number a stage of the model, from its first stage to its
    last. Where a schedule has two copies of the model, both cost the same.

    Args:
        forward: F.
        backward_input: I. A full backward (B) takes as long as I and W together.
        backward_weight: W.
        communication: from the end of an action until what it hands on is there for a stage on another rank. It takes
            no time away from either rank.
        recompute: C; as long as ``forward`` where it is not given.
        overlap: how long an overlap of a forward and a backward takes, as a factor of the sum of the two: 1.0 gains
            nothing, 0.8 hides a fifth.
        reduce: R, once a step.
        optimizer_step: O, once a step.
    """

    forward: Cost
    backward_input: Cost
    backward_weight: Cost
    communication: float = 0.0
    recompute: Cost | None = None
    overlap: float = 1.0
    reduce: Cost = 0.0
    optimizer_step: Cost = 0.0

    def __post_init__(self) -> None:
        for name in PER_STAGE:
            value = getattr(self, name)
            for number in value if isinstance(value, Sequence) else () if value is None else (value,):
                _require_time(name, number)
        _require_time("communication", self.communication)
        _require_time("overlap", self.overlap)
        lengths = {len(v): name for name in PER_STAGE if isinstance(v := getattr(self, name), Sequence)}
        if 0 in lengths:
            raise ValueError(f"{lengths[0]}: needs a number a stage, or one for all, but is empty")
        if len(lengths) > 1:
            story = ", ".join(f"{name} {length}" for length, name in lengths.items())
            raise ValueError(f"costs by stage must be given for the same number of stages: {story}")

    @classmethod
    def of_rank(
        cls,
        forward: float,
        backward_input: float,
        backward_weight: float,
        communication: float = 0.0,
        chunks: float = 1,
        recompute: float | None = None,
        overlap: float = 1.0,
    ) -> Costs:
        """The costs of a stage where a rank's share of the model, which takes the times given, is cut into ``chunks``.

        So the Zero Bubble paper (arXiv 2401.10241) counts: a rank works equally long whatever its schedule cuts it
        into. ``chunks`` is ``stages_per_copy / num_ranks``: 1 for DualPipe, whose two stages a rank are whole shares.
        """
        return cls(
            forward / chunks,
            backward_input / chunks,
            backward_weight / chunks,
            communication,
            recompute=None if recompute is None else recompute / chunks,
            overlap=overlap,
        )

    @property
    def num_stages(self) -> int | None:
        """The number of stages that the costs are given for; None where all stages cost the same."""
        return next((len(v) for name in PER_STAGE if isinstance(v := getattr(self, name), Sequence)), None)

    def by_kind(self, num_stages: int) -> dict[Kind, list[float]]:
        """For each kind of action its time on each stage of a copy. Raises ValueError for another number of stages."""
        if self.num_stages not in (None, num_stages):
            raise ValueError(f"costs are given for {self.num_stages} stages, but the schedule has {num_stages}")
        by_name = {name: _spread(getattr(self, name), num_stages) for name in PER_STAGE if name != "recompute"}
        inputs, weights = by_name["backward_input"], by_name["backward_weight"]
        return {
            Kind.F: by_name["forward"],
            Kind.B: [i + w for i, w in zip(inputs, weights, strict=True)],
            Kind.I: inputs,
            Kind.W: weights,
            Kind.C: by_name["forward"] if self.recompute is None else _spread(self.recompute, num_stages),
            Kind.R: by_name["reduce"],
            Kind.O: by_name["optimizer_step"],
        }

    def recut(self, num_stages: int) -> Costs:
        """The same model cut into ``num_stages`` stages; costs that are given once for all stages stay as they are.

        Neighbours are added up for fewer stages; for more, each stage is cut into equal parts. Raises ValueError where
        neither number divides the other.
        """
        given = self.num_stages
        if given in (None, num_stages):
            return self
        assert given is not None
        if given % num_stages and num_stages % given:
            raise ValueError(f"costs for {given} stages cannot be cut into {num_stages} stages")
        values = {name: value for name in PER_STAGE if (value := getattr(self, name)) is not None}
        changes: dict[str, Any] = {name: _recut(_spread(value, given), num_stages) for name, value in values.items()}
        return replace(self, **changes)


def _require_time(name: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number) or number < 0:
        raise ValueError(f"{name}: {number!r} is not a time; must be a number of 0 or more")


def _spread(cost: Cost, num_stages: int) -> list[float]:
    return [float(number) for number in cost] if isinstance(cost, Sequence) else [float(cost)] * num_stages


def _recut(costs: list[float], num_stages: int) -> list[float]:
    if len(costs) >= num_stages:
        size = len(costs) // num_stages
        return [sum(costs[i : i + size]) for i in range(0, len(costs), size)]
    parts = num_stages // len(costs)
    return [cost / parts for cost in costs for _ in range(parts)]
