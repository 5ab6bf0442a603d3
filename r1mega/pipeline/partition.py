"""Cuts a model into pipeline stages: by cost, or as the user's placement string says."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from r1mega.config import ConfigError, require

KINDS = {"E": "the embedding", "t": "decoder layers", "m": "MTP layers", "L": "the output head"}


@dataclass(frozen=True)
class Block:
    """A piece of the model that is never cut.

    Args:
        kind: ``E`` embedding, ``t`` decoder layer, ``m`` MTP layer, ``L`` output head and loss.
        index: number among the blocks of its kind.
        cost: time, in any unit that is the same for all.
    """

    kind: str
    index: int
    cost: float


def partition(blocks: list[Block], num_stages: int) -> list[list[Block]]:
    """Cut ``blocks`` into contiguous stages, each with a decoder or MTP layer at least.

    Exact: of all cuts the one with the smallest largest stage cost; of these the most even one (smallest sum of squared
    stage costs); of these the one whose first stage holds most blocks, then the second, and so on.

    Raises:
        ConfigError: there are more stages than layers.
    """
    num_layers = sum(block.kind in "tm" for block in blocks)
    num_decoder_layers = sum(block.kind == "t" for block in blocks)
    require(num_stages > 0, "pipeline stages", num_stages, "must be positive")
    require(
        num_stages <= num_layers,
        "pipeline stages", num_stages,
        f"more stages than layers: model.num_layers ({num_decoder_layers}) and model.num_mtp_layers "
        f"({num_layers - num_decoder_layers}) make {num_layers}; use at most {num_layers}",
    )  # fmt: skip
    costs = _stage_costs(blocks)
    largest, _ = _best_cut(len(blocks), num_stages, costs, max)
    squares = {span: cost * cost for span, cost in costs.items() if cost <= largest}
    _, ends = _best_cut(len(blocks), num_stages, squares, operator.add)
    return [blocks[start:end] for start, end in itertools.pairwise([0, *ends])]


Span = tuple[int, int]


def _stage_costs(blocks: list[Block]) -> dict[Span, int]:
    """Cost of every stage that is allowed, in whole units of 2^-40 of the total, so that equal cuts compare equal."""
    total = sum(block.cost for block in blocks)
    units = [round(block.cost / total * 2**40) if total > 0 else 0 for block in blocks]
    sums = [0, *itertools.accumulate(units)]
    layers = [0, *itertools.accumulate(int(block.kind in "tm") for block in blocks)]
    spans = itertools.combinations(range(len(blocks) + 1), 2)
    return {(start, end): sums[end] - sums[start] for start, end in spans if layers[end] > layers[start]}


def _best_cut(
    num_blocks: int, num_stages: int, costs: dict[Span, int], combine: Callable[[int, int], int]
) -> tuple[int, list[int]]:
    """The smallest combined cost of ``num_stages`` spans that cover all blocks, and where they end."""
    best: dict[int, tuple[int, list[int]]] = {num_blocks: (0, [])}  # where the stages so far begin -> cost and ends
    for _ in range(num_stages):
        longer: dict[int, tuple[int, list[int]]] = {}
        for end in sorted(best, reverse=True):  # the longest first, and only a smaller cost replaces it
            cost, ends = best[end]
            for start in range(end):
                if (start, end) in costs:
                    new = combine(costs[start, end], cost)
                    if start not in longer or new < longer[start][0]:
                        longer[start] = (new, [end, *ends])
        best = longer
    return best[0]


def parse_placement(text: str, blocks: list[Block], num_stages: int) -> list[list[Block]]:
    """Cut ``blocks`` as a placement says: ``Et*3|t*4|t*4mL`` (see :class:`r1mega.config.ParallelConfig`).

    Raises:
        ConfigError: one line, where the text is not a placement, or does not place each block once and in order.
    """
    stages = [_parse_stage(part, text) for part in re.sub(r"\s", "", text).split("|")]

    def fail(reason: str) -> ConfigError:
        return ConfigError(f"parallel.placement={text}: {reason}")

    if len(stages) != num_stages:
        raise fail(f"has {len(stages)} stages, the schedule has {num_stages}")
    for number, stage in enumerate(stages):
        if not stage:
            raise fail(f"stage {number} (counted from 0) is empty")
    placed, wanted = "".join(stages), "".join(block.kind for block in blocks)
    for kind, name in KINDS.items():
        if placed.count(kind) != wanted.count(kind):
            raise fail(f"places {placed.count(kind)} of {kind} ({name}), the model has {wanted.count(kind)}")
    if placed != wanted:
        raise fail("the order must be E, then all t, then all m, then L")
    ends = itertools.accumulate(len(stage) for stage in stages)
    return [blocks[end - len(stage) : end] for stage, end in zip(stages, ends, strict=True)]


def _parse_stage(part: str, text: str) -> str:
    """``Et*3`` as ``Ettt``."""
    expanded, position = "", 0
    while position < len(part):
        match = re.compile(r"([EtmL])(?:\*([1-9][0-9]{0,4}))?(?=[EtmL]|$)", re.ASCII).match(part, position)
        if match is None:
            raise ConfigError(f"parallel.placement={text}: cannot read {part[position:]!r}; use E, t, m, L, | and t*3")
        expanded += match[1] * int(match[2] or 1)
        position = match.end()
    return expanded
