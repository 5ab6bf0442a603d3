"""What tests of routing share, here and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from r1mega.kernels.route import TILE_TOKENS, Choices, RouteOptions

FUNCTIONS = [("sigmoid", True), ("sigmoid", False), ("softmax", True), ("softmax", False)]


@contextmanager
def no_wait() -> Iterator[None]:
    """An operation that waits for the GPU is an error; kernels must have been compiled before."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def options_of(size: tuple[int, ...], function: tuple[str, bool]) -> RouteOptions:
    """Of a size (tokens, experts, choices, groups, kept groups) and a function (its name, whether to normalise)."""
    return RouteOptions(size[2], function[0], size[3], size[4], function[1], factor=2.5)


def ranks_over_all_tokens(choices: Choices) -> Tensor:
    """Ranks as the reference counts them."""
    first_row = choices.first_row_NE
    if first_row.shape[0] == 1:
        return choices.ranks_TK
    tile = (torch.arange(len(choices.experts_TK), device=first_row.device) // TILE_TOKENS).unsqueeze(1)
    return choices.ranks_TK + (first_row - first_row[:1])[tile, choices.experts_TK]


def assert_equal(actual: Choices, expected: Choices, sums_tolerance: float) -> None:
    """Experts, ranks and counts are the same, weights to 1e-6."""
    assert torch.equal(actual.experts_TK, expected.experts_TK)
    assert torch.equal(ranks_over_all_tokens(actual), expected.ranks_TK)
    assert torch.equal(actual.counts_E, expected.counts_E)
    torch.testing.assert_close(actual.weights_TK, expected.weights_TK, rtol=1e-6, atol=1e-6, equal_nan=True)
    close = {"rtol": sums_tolerance, "atol": sums_tolerance, "equal_nan": True}
    torch.testing.assert_close(actual.score_sums_E, expected.score_sums_E, **close)
