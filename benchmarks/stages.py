"""A table of stages: time, bytes moved, floor, fraction of what the machine can do, and the times of the peers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.timing import Work, seconds

OURS = "r1mega"


@dataclass(frozen=True)
class Stage:
    """A stage in one direction.

    Args:
        works: what each implementation does, r1mega's under :data:`OURS`; a peer that lacks the stage is left out.
        moved_bytes: what r1mega's implementation reads and writes, each once; what the caches do is not in it.
        floor_bytes: the fewest that any can; 0 where products are most of the work.
        flops: multiply-adds of the products, times two.
    """

    works: Mapping[str, Work]
    moved_bytes: int
    floor_bytes: int = 0
    flops: int = 0

    def __post_init__(self) -> None:
        assert bool(self.floor_bytes) != bool(self.flops), "a stage is held to a copy or to a product"


@dataclass(frozen=True)
class Rates:
    """Bytes that a large copy moves in a second, and operations of a large product."""

    copy: float
    product: float


@dataclass
class Lines:
    """The stages' times, as they go into JSON; a line's name is the stage's and its direction."""

    stages: Mapping[tuple[str, str], Stage]
    rates: Rates
    lines: list[dict] = field(default_factory=list)

    def measure(self, rounds: int, calls: int, device: torch.device) -> list[dict]:
        """Each stage with its peers in turn."""
        for (name, direction), stage in self.stages.items():
            times = seconds(stage.works, rounds, calls, device)
            ours = times.pop(OURS)
            if stage.floor_bytes:
                fraction = stage.floor_bytes / statistics.median(ours) / self.rates.copy
            else:
                fraction = stage.flops / statistics.median(ours) / self.rates.product
            self.lines.append(
                {"stage": name, "direction": direction, "seconds": ours, "moved_bytes": stage.moved_bytes}
                | {"floor_bytes": stage.floor_bytes, "flops": stage.flops, "fraction": fraction, "peers": times}
            )
        return self.lines


def table(lines: list[dict]) -> str:
    """The lines as text. Times in ms; a floor of products is in GFLOP, all others in MB."""
    peers = list(dict.fromkeys(name for line in lines for name in line["peers"]))
    widths = {name: max(len(name) + 2, 10) for name in peers}
    head = f"{'stage':20}{OURS + ' ms':>10}{'moved MB':>10}{'floor':>14}{'fraction':>10}  {'of':8}"
    rows = [head + "".join(f"{name:>{widths[name]}}" for name in peers)]
    for line in lines:
        floor, of = f"{line['floor_bytes'] / 1e6:.1f} MB", "copy"
        if line["flops"]:
            floor, of = f"{line['flops'] / 1e9:.2f} GFLOP", "product"
        name = line["stage"] + (" backward" if line["direction"] == "backward" else "")
        row = f"{name:20}{_ms(line['seconds']):>10}{line['moved_bytes'] / 1e6:10.1f}{floor:>14}{line['fraction']:10.2f}"
        cells = (f"{_ms(line['peers'].get(peer)):>{widths[peer]}}" for peer in peers)
        rows.append(f"{row}  {of:8}" + "".join(cells))
    return "\n".join(rows)


def _ms(values: list[float] | None) -> str:
    return "" if values is None else f"{statistics.median(values) * 1e3:.2f}"
