"""Drawing tokens: the right distribution, from random numbers that depend on nothing but what is drawn."""

from __future__ import annotations

import pytest
import torch

from r1mega.rl.rollout import sampler
from r1mega.rl.rollout.engine import Sampling
from r1mega.rl.rollout.sampler import GOLDEN, WORD, draw, mixed, nucleus, stream, uniforms

CHI_SQUARE_7_AT_1E_6 = 40.5  # of 7 degrees of freedom; a right sampler is beyond once in a million


def numbers(seed: int, key: int, sample: int, count: int) -> torch.Tensor:
    return uniforms(torch.full((count,), stream(seed, key, sample)), torch.arange(count))


def test_random_numbers_are_splitmix64_of_stream_and_position():
    start = stream(3, 5, 7)
    expected = [(mixed((start + (n + 1) * GOLDEN) % WORD) >> 11) / 2**53 for n in range(50)]
    assert numbers(3, 5, 7, 50).tolist() == expected


def test_a_random_number_does_not_depend_on_the_rest_of_the_batch():
    streams = torch.tensor([stream(1, key, 0) for key in range(6)])
    positions = torch.tensor([4, 0, 9, 2, 2, 7])
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert torch.equal(uniforms(streams, positions)[order], uniforms(streams[order], positions[order]))


@pytest.mark.parametrize("other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1), (2**64 - 1, 0, 0)])
def test_seed_request_and_sample_give_other_numbers(other):
    one, two = numbers(0, 0, 0, 4000), numbers(*other, 4000)
    assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 0.08
    for values in (one, two):
        assert 0 <= values.min() < 0.01 and 0.99 < values.max() < 1
        counts = torch.histc(values, bins=8, min=0, max=1)
        assert ((counts - 500) ** 2 / 500).sum() < CHI_SQUARE_7_AT_1E_6


def test_frequencies_follow_the_tempered_probabilities():
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.7, -2.0])
    count = 20000
    tokens, log_probs = draw(logits.expand(count, -1), numbers(0, 1, 2, count), Sampling(temperature=0.7), 8)
    expected = (logits.double() / 0.7).softmax(0)
    counts = torch.bincount(tokens, minlength=8)
    assert ((counts - count * expected) ** 2 / (count * expected)).sum() < CHI_SQUARE_7_AT_1E_6
    torch.testing.assert_close(log_probs, expected.log()[tokens], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    probabilities = torch.rand(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1)
    kept = nucleus(probabilities, top_p)
    for row, of_row in zip(probabilities.tolist(), kept.tolist(), strict=True):
        total, wanted = 0.0, set()
        for token in sorted(range(30), key=lambda token: -row[token]):
            if total >= top_p:
                break
            total += row[token]
            wanted.add(token)
        assert {token for token in range(30) if of_row[token] > 0} == wanted
        assert all(of_row[token] == row[token] for token in wanted)


def test_equal_probabilities_enter_the_nucleus_in_the_order_of_their_ids():
    kept = nucleus(torch.tensor([[0.1, 0.3, 0.3, 0.3]], dtype=torch.float64), 0.5)
    assert kept.tolist() == [[0.0, 0.3, 0.3, 0.0]]


def test_top_p_draws_inside_the_nucleus_in_its_proportions_and_reports_the_whole_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    probabilities = logits.double().softmax(0)  # 2 and 1 have 0.78 together
    tokens, log_probs = draw(logits.expand(20000, -1), numbers(1, 0, 0, 20000), Sampling(top_p=0.7), 5)
    assert set(tokens.tolist()) == {1, 2}
    share = (probabilities[1] / (probabilities[1] + probabilities[2])).item()
    assert (tokens == 1).double().mean().item() == pytest.approx(share, abs=0.015)
    torch.testing.assert_close(log_probs, probabilities.log()[tokens])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_ids_beyond_the_tokenizer_are_never_drawn_but_count_in_log_probabilities(temperature, top_p):
    logits = torch.tensor([0.0, 1.0, 0.5, 9.0, 9.0])
    sampling = Sampling(temperature=temperature, top_p=top_p)
    tokens, log_probs = draw(logits.expand(500, -1), numbers(1, 0, 0, 500), sampling, 3)
    assert tokens.max() < 3
    torch.testing.assert_close(log_probs, logits.double().log_softmax(0)[tokens])


def test_temperature_zero_takes_the_greatest_logit():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = draw(logits, torch.zeros(50).double(), Sampling(temperature=0), 40)
    assert torch.equal(tokens, logits.argmax(1))
    torch.testing.assert_close(log_probs, logits.double().log_softmax(1).amax(1))


def test_an_impossible_id_is_not_drawn_by_the_greatest_or_smallest_random_number():
    logits = torch.tensor([[-torch.inf, 0.0, 0.3, 0.1, -torch.inf]]).expand(2, -1)
    tokens, _ = draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), Sampling(), 5)
    assert tokens.tolist() == [1, 3]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_large_vocabulary_in_parts_gives_the_same(monkeypatch, top_p):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    whole = draw(logits, numbers(0, 0, 0, 50), Sampling(top_p=top_p), 40)
    monkeypatch.setattr(sampler, "ELEMENTS_AT_ONCE", 40 * 7)
    parts = draw(logits, numbers(0, 0, 0, 50), Sampling(top_p=top_p), 40)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be 0 (greedy) or more"),
        ({"top_p": 0.0}, "top_p=0.0: must be more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5: must be more than 0 and at most 1"),
        ({"max_tokens": 0}, "max_tokens=0: must be 1 or more"),
    ],
)
def test_settings_that_cannot_be_name_themselves(settings, message):
    with pytest.raises(ValueError) as error:
        Sampling(**settings)
    assert str(error.value) == message
