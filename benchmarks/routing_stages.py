"""Router, permutation and combination as stages, forward and backward, r1mega's beside its peers'.

Shapes: T tokens, E experts, K choices a token, H hidden, R = T K rows; b bytes of a number of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers.routing_functions import R1mega, Routed, RoutingFunctions, installed_peers
from benchmarks.stages import OURS, Stage
from benchmarks.timing import Work

NAMES = ("route", "permute", "combine")
ID, FLOAT = 8, 4  # bytes of r1mega's experts, ranks and rows of choices, and of logits and weights


def routing_stages(given: Routed) -> dict[tuple[str, str], Stage]:
    """The stages by name and direction."""
    implementations: dict[str, RoutingFunctions] = {OURS: R1mega(given), **installed_peers(given)}
    works = {name: _works(functions, given) for name, functions in implementations.items()}
    moved, floors = moved_bytes(given), floor_bytes(given)
    return {
        (name, direction): Stage(
            {who: of_who[name, direction] for who, of_who in works.items()},
            moved[name, direction],
            floors[name, direction],
        )
        for direction in ("forward", "backward")
        for name in NAMES
    }


def leaf(tensor: Tensor) -> Tensor:
    """The same numbers at the beginning of a graph."""
    return tensor.detach().requires_grad_()


def _works(functions: RoutingFunctions, given: Routed) -> Mapping[tuple[str, str], Work]:
    """The backwards run again and again on one graph."""
    logits, x, weights = leaf(given.logits_TE), leaf(given.x_TH), leaf(functions.weights)
    routed = functions.route(logits)
    rows, row_weights, order = functions.permute(x, weights)
    rows_leaf = leaf(rows)
    combined = functions.combine(rows_leaf, order)
    grads = [torch.randn_like(tensor) for tensor in (routed, rows, row_weights)]
    back = partial(torch.autograd.grad, retain_graph=True)
    return {
        ("route", "forward"): lambda: functions.route(logits),
        ("permute", "forward"): lambda: functions.permute(x, weights),
        ("combine", "forward"): lambda: functions.combine(rows_leaf, order),
        ("route", "backward"): lambda: back(routed, logits, grads[0]),
        ("permute", "backward"): lambda: back((rows, row_weights), (x, weights), (grads[1], grads[2])),
        ("combine", "backward"): lambda: back(combined, rows_leaf, given.grad_TH),
    }


def _sizes(given: Routed) -> tuple[int, int, int, int]:
    """Bytes of the logits, number of choices, bytes of the tokens and of the routed rows."""
    num_choices = given.choices.experts_TK.numel()
    return given.logits_TE.nbytes, num_choices, given.x_TH.nbytes, given.x_TH[:1].nbytes * num_choices


def floor_bytes(given: Routed) -> dict[tuple[str, str], int]:
    """The fewest bytes that a stage can move: indices of 4 bytes, nothing kept for the backward, nothing twice."""
    logits, choices, tokens, rows = _sizes(given)
    return {
        ("route", "forward"): logits + 2 * choices * 4,
        ("permute", "forward"): tokens + rows + choices * 4,
        ("combine", "forward"): rows + tokens + 2 * choices * 4,
        ("combine", "backward"): tokens + rows,
        ("permute", "backward"): rows + tokens,
        ("route", "backward"): 2 * choices * 4 + logits,
    }


def moved_bytes(given: Routed) -> dict[tuple[str, str], int]:
    """What r1mega's implementation reads and writes.

    Its indices have 8 bytes. On a CPU the router writes all scores, which its own choice and the backward read; on a
    GPU the scores of the chosen. Weights are copied to their rows by an operation of its own, which begins with zeros.
    """
    logits, choices, tokens, rows = _sizes(given)
    weights, ids = choices * FLOAT, choices * ID
    on_gpu = given.logits_TE.is_cuda
    every_logit = logits if given.options.needs_logits else 0
    kept, read_back = (weights, weights + every_logit) if on_gpu else (2 * logits, logits)
    return {
        ("route", "forward"): logits + kept + weights + 2 * ids,
        ("permute", "forward"): tokens + 2 * ids + rows + ids + (ids + 3 * weights),
        ("combine", "forward"): rows + ids + tokens,
        ("combine", "backward"): tokens + ids + rows,
        ("permute", "backward"): rows + ids + tokens + (ids + 2 * weights),
        ("route", "backward"): weights + ids + read_back + logits,
    }
