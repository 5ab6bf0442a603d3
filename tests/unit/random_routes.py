"""Random sizes and logits for the tests of routing: the same in each run, and over all that the kernels take."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from r1mega.kernels.route import RouteOptions

MOST_TOKENS, MOST_EXPERTS, MOST_CHOICES, MOST_GROUPS = 5000, 384, 16, 32
FUNCTIONS = [("sigmoid", True), ("sigmoid", False), ("softmax", True), ("softmax", False)]
KINDS = ("any", "with ties", "not finite")


@dataclass
class RandomRoute:
    """One call of ``route``; its name says what a failing test was given."""

    logits_TE: Tensor
    bias_E: Tensor | None
    options: RouteOptions
    name: str


def random_route(
    seed: int, most_tokens: int = MOST_TOKENS, kinds: tuple[str, ...] = KINDS, size: tuple[int, ...] | None = None
) -> RandomRoute:
    """Tokens from 0 to ``most_tokens``, and any number of experts, choices, groups and kept groups that fit together.

    Args:
        seed: of all; function and kind take turns.
        most_tokens: the greatest number of tokens.
        kinds: ``any`` logits; ``with ties``, where different ones are far apart; ``not finite``: these with NaN and
            infinities, some tokens with nothing else.
        size: tokens, experts, choices, groups and kept groups, instead of random ones.
    """
    draw = random.Random(seed)
    function, kind = FUNCTIONS[seed % len(FUNCTIONS)], kinds[seed // len(FUNCTIONS) % len(kinds)]
    num_groups = draw.choice([1, draw.randint(2, MOST_GROUPS)])
    num_experts = num_groups * draw.randint(1, MOST_EXPERTS // num_groups)
    top_k, top_k_groups = draw.randint(1, min(MOST_CHOICES, num_experts)), draw.randint(1, num_groups)
    num_tokens = draw.randint(0, most_tokens)
    if size is not None:
        num_tokens, num_experts, top_k, num_groups, top_k_groups = size
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    bias = torch.randn(num_experts, generator=generator) * 0.3
    if kind != "any":
        logits, bias = (logits * 2).round() / 2, (bias * 4).round() / 4
        if num_groups > 1 and function[0] == "sigmoid":  # scores of 0, 1/2 and 1, since no group's sum may be rounded
            logits = torch.tensor([-200.0, 0.0, 40.0])[(logits.clamp(-1, 1).round() + 1).long()]
    if kind == "not finite":
        spoil(logits, generator)
    # To a softmax's small scores any bias is large; and where kernels have exponentials of their own, values with one
    # that differ by a rounding error could be chosen otherwise.
    given = bias if draw.random() < 0.7 and (function[0] == "sigmoid" or kind == "any") else None
    options = RouteOptions(top_k, function[0], num_groups, top_k_groups, function[1], factor=2.5)
    name = f"{seed}: T={num_tokens} E={num_experts} {options} {kind}{' with bias' if given is not None else ''}"
    return RandomRoute(logits, given, options, name)


def spoil(logits_TE: Tensor, generator: torch.Generator) -> None:
    """One number in ten becomes NaN or infinite in a third of the tokens; a few tokens become so as a whole."""
    spoiled = torch.rand(logits_TE.shape, generator=generator) < 0.1
    spoiled[torch.rand(len(logits_TE), generator=generator) > 0.3] = False
    by = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -math.inf])
    logits_TE[spoiled] = by[torch.randint(0, len(by), (int(spoiled.sum()),), generator=generator)]
    for place, number in enumerate(by.tolist()):
        logits_TE[place::37] = number
