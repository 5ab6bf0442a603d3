"""Router, permutation and combination by name: r1mega's, PyTorch's operations, megatron-core's, Transformer Engine's.

All do the same: weights of the chosen experts; the rows and weights of the tokens in the experts' order; the sum of
each token's rows. Each starts from what its own router hands over: the first two from the experts of each token, the
others, as Megatron's all-to-all dispatcher calls them, from a dense map and dense probabilities, whose making is the
router's. Those two copy rows in the order of a map of experts by tokens, which is r1mega's order.

Shapes: T tokens, E experts, K choices a token, H hidden, R rows.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from r1mega.data.megatron import quiet_import
from r1mega.kernels.combine import combine
from r1mega.kernels.permute import permute
from r1mega.kernels.route import Choices, RouteOptions, rank_choices, route


@dataclass
class Routed:
    """Tokens, what was decided for them, and upstream gradients.

    Args:
        x_TH: tokens.
        logits_TE: float32.
        options: of the router; no groups.
        choices: r1mega's for these logits.
        grad_TH: of the sums.
    """

    x_TH: Tensor
    logits_TE: Tensor
    options: RouteOptions
    choices: Choices
    grad_TH: Tensor

    def dense(self, values_TK: Tensor) -> Tensor:
        """``[T, E]``, zero for experts that were not chosen."""
        return values_TK.new_zeros(self.logits_TE.shape).scatter_(1, self.choices.experts_TK, values_TK)


class RoutingFunctions(Protocol):
    """One implementation. ``weights`` is what :meth:`permute` takes: ``[T, K]``, or ``[T, E]`` with zeros."""

    weights: Tensor

    def route(self, logits_TE: Tensor) -> Tensor: ...

    def permute(self, x_TH: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Rows ``[R, H]``, their weights ``[R]``, and what :meth:`combine` wants."""

    def combine(self, rows_RH: Tensor, order: Any) -> Tensor: ...


class R1mega:
    """``ranked``: ranks of the choices are at hand, as after r1mega's own router; else they are counted first."""

    def __init__(self, given: Routed, ranked: bool = True) -> None:
        self.given, self.ranked, self.weights = given, ranked, given.choices.weights_TK.detach()

    def route(self, logits_TE: Tensor) -> Tensor:
        return route(logits_TE, None, self.given.options).weights_TK

    def permute(self, x_TH: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Any]:
        chosen = self.given.choices
        if self.ranked:
            decided = chosen.ranks_TK, chosen.counts_E
            return permute(x_TH, weights, chosen.experts_TK, *decided, first_row_NE=chosen.first_row_NE)
        ranks = rank_choices(chosen.experts_TK, self.given.logits_TE.shape[1])
        return permute(x_TH, weights, chosen.experts_TK, *ranks)

    def combine(self, rows_RH: Tensor, order: Any) -> Tensor:
        return combine(rows_RH, order)


class PyTorch:
    """``topk``; ``argsort`` and ``index_select``; ``index_add``."""

    def __init__(self, given: Routed) -> None:
        self.given, self.weights = given, given.choices.weights_TK.detach()

    def route(self, logits_TE: Tensor) -> Tensor:
        options = self.given.options
        scores = logits_TE.softmax(-1) if options.score_function == "softmax" else logits_TE.sigmoid()
        weights = scores.topk(options.top_k).values
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) if options.normalize else weights

    def permute(self, x_TH: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Any]:
        order = self.given.choices.experts_TK.flatten().argsort(stable=True)
        token_of_row = order // self.given.options.top_k
        rows, row_weights = x_TH.index_select(0, token_of_row), weights.flatten().index_select(0, order)
        return rows, row_weights, token_of_row

    def combine(self, rows_RH: Tensor, order: Any) -> Tensor:
        return torch.zeros_like(self.given.x_TH).index_add(0, order, rows_RH)


class Megatron:
    """``moe_utils`` of megatron-core, as its all-to-all dispatcher calls it by default."""

    def __init__(self, given: Routed) -> None:
        with quiet_import():
            self.functions = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        self.given, options = given, given.options
        self.weights = given.dense(given.choices.weights_TK.detach())
        self.map_TE = given.dense(torch.ones_like(given.choices.weights_TK)).bool()
        # It divides weights by their sum with sigmoid and several choices, and by a softmax over the chosen.
        assert options.normalize == (options.score_function == "softmax" or options.top_k > 1)

    def route(self, logits_TE: Tensor) -> Tensor:
        options = self.given.options
        found = self.functions.topk_routing_with_score_function(
            logits_TE, options.top_k, score_function=options.score_function
        )
        return found[0]

    def permute(self, x_TH: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Any]:
        num_rows = self.given.choices.experts_TK.numel()
        return self.functions.permute(x_TH, self.map_TE, probs=weights, num_out_tokens=num_rows)

    def combine(self, rows_RH: Tensor, order: Any) -> Tensor:
        return self.functions.unpermute(rows_RH, order, self.given.x_TH.shape)


def runs_on_gpu(given: Routed) -> bool:
    return given.x_TH.is_cuda


class TransformerEngine:
    """The fused router and permutation of Transformer Engine 2.7 or newer, on a GPU."""

    def __init__(self, given: Routed) -> None:
        if not runs_on_gpu(given):
            raise ImportError("Transformer Engine's kernels run on a GPU only")
        self.router = importlib.import_module("transformer_engine.pytorch.router")
        self.permutation = importlib.import_module("transformer_engine.pytorch.permutation")
        self.given = given
        self.weights = given.dense(given.choices.weights_TK.detach())
        self.map_TE = given.dense(torch.ones_like(given.choices.weights_TK)).bool()

    def route(self, logits_TE: Tensor) -> Tensor:
        options = self.given.options
        found = self.router.fused_topk_with_score_function(
            logits_TE, options.top_k, False, None, None, None, options.score_function, None
        )
        return found[0]

    def permute(self, x_TH: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Any]:
        num_rows = self.given.choices.experts_TK.numel()
        return self.permutation.moe_permute_with_probs(x_TH, weights, self.map_TE, num_out_tokens=num_rows)

    def combine(self, rows_RH: Tensor, order: Any) -> Tensor:
        return self.permutation.moe_unpermute(rows_RH, order, restore_shape=self.given.x_TH.shape, map_type="mask")


PEERS = {"PyTorch": PyTorch, "megatron-core": Megatron, "Transformer Engine": TransformerEngine}


def installed_peers(given: Routed) -> dict[str, RoutingFunctions]:
    """Those that can be had here."""
    found: dict[str, RoutingFunctions] = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(given)
        except ImportError:
            continue
    return found
