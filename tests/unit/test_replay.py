"""Routing replay: what is forced, what is left to the live router, and what is an error."""

from __future__ import annotations

import pytest
import torch

from r1mega.config import MoEConfig
from r1mega.moe.replay import NO_RECORD, ExpertRecord, ReplayError
from r1mega.moe.router import Router
from r1mega.parallel_state import ParallelState

LIVE = torch.tensor([[0, 1], [2, 3], [1, 0]])


def test_an_empty_record_keeps_what_the_router_chooses() -> None:
    record = ExpertRecord()
    assert record.layer(3).replace(LIVE, 0) is None
    assert record.choices[3].dtype == torch.int16 and torch.equal(record.choices[3].long(), LIVE)


def test_a_filled_record_is_repeated_and_rows_without_a_record_are_the_live_routers() -> None:
    choices = torch.tensor([[2, 1], [NO_RECORD, NO_RECORD], [0, 1]], dtype=torch.int16)
    record = ExpertRecord({3: choices})
    found = record.layer(3).replace(LIVE, 0)
    assert found is not None and found.tolist() == [[2, 1], [2, 3], [0, 1]]
    # the order of a token's experts does not matter: 1 of 2 in the first row, both in the last
    assert record.agreement[3].tolist() == [3, 4]
    record.require_used([3])


def test_a_rank_repeats_its_own_tokens() -> None:
    record = ExpertRecord({3: torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]], dtype=torch.int16)})
    found = record.layer(3).replace(LIVE[:2], 2)
    assert found is not None and found.tolist() == [[1, 2], [3, 0]]


def test_asking_twice_as_recomputation_does_counts_once() -> None:
    record = ExpertRecord({3: LIVE.to(torch.int16)})
    for _ in range(2):
        record.layer(3).replace(LIVE, 0)
    assert record.agreement[3].tolist() == [6, 6]


def test_a_layer_without_a_record_is_an_error() -> None:
    with pytest.raises(ReplayError, match=r"layer 4: no expert choices were recorded, only those of \[3\]"):
        ExpertRecord({3: LIVE.to(torch.int16)}).layer(4).replace(LIVE, 0)


def test_a_record_that_nobody_used_is_an_error() -> None:
    record = ExpertRecord({3: LIVE.to(torch.int16), 4: LIVE.to(torch.int16)})
    record.layer(3).replace(LIVE, 0)
    with pytest.raises(ReplayError, match=r"layers \[4\] were recorded but not used"):
        record.require_used([3])


def test_a_layer_that_repeated_nothing_is_an_error() -> None:
    record = ExpertRecord({3: LIVE.to(torch.int16)})
    record.layer(3).replace(LIVE, 0)
    with pytest.raises(ReplayError, match=r"layers \[4\] repeated no expert choices"):
        record.require_used([3, 4])


@pytest.mark.parametrize("choices", [LIVE[:2], LIVE[:, :1]], ids=["too few tokens", "too few experts"])
def test_a_record_of_another_shape_is_an_error(choices: torch.Tensor) -> None:
    with pytest.raises(ReplayError, match="expert choices were recorded, not those of tokens 0 to 3 with 2 each"):
        ExpertRecord({3: choices.to(torch.int16)}).layer(3).replace(LIVE, 0)


def test_forced_experts_have_the_weights_of_the_live_scores_and_the_router_learns() -> None:
    router = Router(8, MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=8), ParallelState.single_process())
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    free = router(hidden, 3, 1)
    others = torch.tensor([[0, 1], [2, 3], [1, 2]])
    routing = router(hidden, 3, 1, ExpertRecord({0: others.to(torch.int16)}).layer(0))
    assert torch.equal(routing.experts_TK, others) and not torch.equal(free.experts_TK.sort().values, others)
    assert routing.counts_E.tolist() == [1, 2, 2, 1]
    scores = torch.sigmoid(hidden @ router.weight.T).gather(1, others)
    expected = scores / scores.sum(1, keepdim=True) * router.config.routed_scaling_factor
    torch.testing.assert_close(routing.weights_TK, expected)
    routing.weights_TK[:, 0].sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().max() > 1e-4
