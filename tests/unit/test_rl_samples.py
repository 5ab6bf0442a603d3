"""Completions as training sees them: their bytes, their order, and their places in microbatches."""

from __future__ import annotations

import pytest
import torch

from r1mega.moe.replay import ReplayError
from r1mega.rl.microbatches import Form, LogProbHead, Microbatch
from r1mega.rl.samples import Sample, _from_bytes, _to_bytes, random_order

K = 2


def sample(index: int, num_prompt: int, num_tokens: int, layers: tuple[int, ...] = (1, 7), **changes) -> Sample:
    rows = num_prompt + num_tokens - 1
    experts = {layer: torch.arange(rows * K, dtype=torch.int16).view(rows, K) + layer for layer in layers}
    prompt, tokens = list(range(100, 100 + num_prompt)), list(range(200, 200 + num_tokens))
    log_probs = -torch.rand(num_tokens, generator=torch.Generator().manual_seed(index))
    return Sample(index, prompt, tokens, 0.1 * index, log_probs, experts=experts, **changes)


def assert_equal(mine: Sample, other: Sample) -> None:
    for name in ("index", "prompt", "tokens", "advantage", "in_loss"):
        assert getattr(mine, name) == getattr(other, name)
    assert torch.equal(mine.rollout_log_probs, other.rollout_log_probs)
    assert mine.experts.keys() == other.experts.keys()
    assert all(torch.equal(rows, other.experts[layer]) for layer, rows in mine.experts.items())


def test_samples_survive_their_bytes_one_behind_the_other() -> None:
    samples = [
        sample(0, 1, 1),
        sample(1, 3, 2, in_loss=False),
        sample(2, 2, 5, layers=()),
        sample(1 << 40, 1, 3, layers=(60,)),
    ]
    samples[1].advantage = -1.2345678901234567
    samples[2].advantage = float("1e-300")
    packed = b"".join(map(_to_bytes, samples))
    found = _from_bytes(torch.frombuffer(bytearray(packed), dtype=torch.uint8).numpy())
    for mine, other in zip(found, samples, strict=True):
        assert_equal(mine, other)


def test_the_order_of_a_rollout_is_a_permutation_of_its_own() -> None:
    orders = [random_order(64, seed, rollout) for seed in (0, 1) for rollout in (0, 1)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert random_order(64, 1, 1) == orders[3]


def microbatch(samples: list[Sample], pack: bool, multiple: int = 1) -> Microbatch:
    return Microbatch(samples, Form(pack, multiple, torch.float64, torch.device("cpu")))


SAMPLES = [sample(0, 1, 1), sample(1, 3, 2), sample(2, 2, 4, in_loss=False)]


@pytest.mark.parametrize(
    ("pack", "multiple", "shape", "starts", "lengths"),
    [
        (False, 1, (3, 5), [0, 5, 10], None),
        (False, 4, (3, 8), [0, 8, 16], None),
        (True, 1, (1, 10), [0, 1, 5], [1, 4, 5]),
        (True, 4, (1, 12), [0, 1, 5], [1, 4, 5, 2]),
    ],
)
def test_each_position_predicts_the_token_that_follows(pack, multiple, shape, starts, lengths) -> None:
    found = microbatch(SAMPLES, pack, multiple)
    batch = found.batch(LogProbHead(found, 1.0), [1, 7])
    assert batch.tokens.shape == shape and batch.packed == lengths
    tokens, targets = batch.tokens.flatten(), found.targets().flatten()
    mask, in_loss = (found.mask(in_loss_only=only).flatten() for only in (False, True))
    counted = batch.counted.flatten()
    for start, each in zip(starts, SAMPLES, strict=True):
        end = start + each.num_inputs
        ids = each.prompt + each.tokens
        assert tokens[start:end].tolist() == ids[:-1] and counted[start:end].all()
        assert targets[start:end][mask[start:end]].tolist() == each.tokens
        assert mask[start:end].tolist() == [False] * (len(each.prompt) - 1) + [True] * len(each.tokens)
        assert in_loss[start:end].any() == each.in_loss
        for layer, rows in each.experts.items():
            assert torch.equal(batch.experts.choices[layer][start:end], rows)
    assert counted.sum() == mask.sum() + sum(len(each.prompt) - 1 for each in SAMPLES) == 10
    assert (batch.experts.choices[1][~counted] == -1).all()


@pytest.mark.parametrize("pack", [False, True])
def test_what_is_put_in_by_token_comes_out_by_sample(pack: bool) -> None:
    found = microbatch(SAMPLES, pack, multiple=4)
    values = found.by_token("rollout_log_probs", torch.float64)
    for each, part in zip(SAMPLES, found.split(values), strict=True):
        assert torch.equal(part, each.rollout_log_probs.double())
    advantages = found.split(found.by_token("advantage", torch.float64))
    assert [part.tolist() for part in advantages] == [[each.advantage] * len(each.tokens) for each in SAMPLES]
    assert found.by_token("ref_log_probs", torch.float64) is None
    assert found.zeros().shape == (found.shape[0] * found.shape[1],)


def test_packed_positions_know_their_sample_and_padded_rows_need_not() -> None:
    ids = microbatch(SAMPLES, True, 4).sequences()
    assert ids is not None and ids.tolist() == [[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]]
    assert microbatch(SAMPLES, False).sequences() is None


@pytest.mark.parametrize("pack", [False, True])
def test_a_record_with_a_gap_is_an_error(pack: bool) -> None:
    for change in ("layer", "row", "token"):
        samples = [sample(0, 1, 1), sample(1, 3, 2)]
        if change == "layer":
            del samples[1].experts[7]
        elif change == "row":
            samples[1].experts[7] = samples[1].experts[7][:1]  # which would be spread over all tokens
        else:
            samples[1].experts[7][2, 1] = -1
        found = microbatch(samples, pack)
        with pytest.raises(ReplayError, match="^layer 7: "):
            found.batch(LogProbHead(found, 1.0), [1, 7])
        found.batch(LogProbHead(found, 1.0), [1])
