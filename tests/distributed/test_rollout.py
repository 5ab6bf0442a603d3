"""Generation in the training processes: the layout never changes a token, and training sees the same probabilities."""

from __future__ import annotations

import functools

import pytest
import torch

from r1mega.config import ParallelConfig
from r1mega.rl.rollout.engine import Sampling
from tests.distributed.rollout import Job, Result, generate

LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "pp2": (2, ParallelConfig(pp=2)),
    "ep2": (2, ParallelConfig(ep=2)),
    "pp2_ep2": (4, ParallelConfig(pp=2, ep=2)),
    "tp2_ep2": (2, ParallelConfig(tp=2, ep=2)),
    "tp2_dp2_ep4": (4, ParallelConfig(tp=2, ep=4)),
    "etp2": (2, ParallelConfig(etp=2)),
    "tp2_pp2": (4, ParallelConfig(tp=2, pp=2)),
    "interleaved": (2, ParallelConfig(pp=2, schedule="interleaved")),
    "zbv": (2, ParallelConfig(pp=2, schedule="zbv")),
}
SAMPLED = Sampling(max_tokens=14, seed=7, stop=(3, 4, 9))
GREEDY = Sampling(temperature=0, max_tokens=14, stop=(3,))


@functools.cache
def single(pool, model: str, sampling: Sampling) -> Result:
    return pool.run(generate, 1, Job(model=model, sampling=sampling))[0]


@functools.cache
def sampled(pool, layout: str) -> list[Result]:
    world_size, parallel = LAYOUTS[layout]
    return pool.run(generate, world_size, Job(parallel=parallel))


def assert_same(results: list[Result], expected: Result) -> None:
    """All completions of all replicas, from each rank, are those of one process; experts and log-probabilities, too."""
    wanted = {(c.key, c.sample): c for c in expected.completions}
    for replica in {result.replica for result in results}:
        orders = [result.finished_order for result in results if result.replica == replica]
        assert all(order == orders[0] for order in orders)
    found = set()
    for result in results:
        assert sorted(result.finished_order) == [(c.key, c.sample) for c in result.completions]
        for completion in result.completions:
            name = completion.key, completion.sample
            other = wanted[name]
            found.add(name)
            assert completion.tokens == other.tokens, name
            assert completion.finished == other.finished
            torch.testing.assert_close(completion.log_probs, other.log_probs, rtol=0, atol=1e-6)
            for layer, experts in completion.experts.items():
                assert torch.equal(experts, other.experts[layer]), (name, layer)
    assert found == set(wanted)
    assert {layer for r in results for c in r.completions for layer in c.experts} == set(
        expected.completions[0].experts
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_a_sampled_token(pool, layout):
    assert_same(sampled(pool, layout), single(pool, "mla", SAMPLED))


@pytest.mark.parametrize("layout", ["tp2", "pp2_ep2"])
def test_the_layout_does_not_change_a_greedy_token(pool, layout):
    world_size, parallel = LAYOUTS[layout]
    results = pool.run(generate, world_size, Job(parallel=parallel, sampling=GREEDY))
    assert_same(results, single(pool, "mla", GREEDY))


@pytest.mark.parametrize(
    ("model", "layout"),
    [("mla_without_q_lora", "tp2_ep2"), ("gqa", "tp2_pp2"), ("gqa", "pp2_ep2"), ("dense", "tp2_pp2")],
)
def test_every_kind_of_model(pool, model, layout):
    world_size, parallel = LAYOUTS[layout]
    if model == "dense":
        parallel = ParallelConfig(tp=parallel.tp, pp=parallel.pp)
    results = pool.run(generate, world_size, Job(model=model, parallel=parallel, sampling=SAMPLED))
    assert_same(results, single(pool, model, SAMPLED))


@pytest.mark.parametrize("layout", ["dp2", "ep2", "pp2_ep2"])
def test_a_rank_without_prompts_takes_part_in_the_messages(pool, layout):
    world_size, parallel = LAYOUTS[layout]
    results = pool.run(generate, world_size, Job(parallel=parallel, empty_ranks=1))
    assert_same(results, single(pool, "mla", SAMPLED))
    assert {len(result.completions) for result in results} == {0, len(single(pool, "mla", SAMPLED).completions)}


def furthest(results: list[Result]) -> float:
    """The greatest difference of a log-probability between generation and the training's forward."""
    pairs = [(c.log_probs, other) for r in results for c, other in zip(r.completions, r.log_probs, strict=False)]
    assert pairs
    return max((mine - other).abs().max().item() for mine, other in pairs)


@pytest.mark.parametrize("model", ["mla", "mla_without_q_lora", "gqa", "dense"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_float32_log_probabilities_are_those_of_the_training_forward(pool, model, temperature):
    sampling = Sampling(temperature=temperature, max_tokens=14, seed=1)
    job = Job(model=model, sampling=sampling, dtype=torch.float32)
    assert furthest(pool.run(generate, 1, job)) < 1e-5


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_recorded_experts_and_log_probabilities_are_those_of_the_training_forward(pool, layout):
    results = [single(pool, "mla", SAMPLED)] if layout is None else sampled(pool, layout)
    assert furthest(results) < 1e-6
    for result in results:
        for completion, experts in zip(result.completions, result.experts, strict=True):
            assert completion.experts.keys() == experts.keys()
            for layer, choices in experts.items():
                assert torch.equal(completion.experts[layer], choices)
                assert choices.shape == (len(completion.prompt) + len(completion.tokens) - 1, 3)
        assert result.counted == 0


@pytest.mark.parametrize("model", ["mla", "dense"])
def test_bfloat16_log_probabilities_and_experts_are_those_of_training_where_keys_and_values_are_kept(pool, model):
    """With lengths that are multiples of 16 in training, as they are here, attention rounds all in the same way."""
    sampling = Sampling(max_tokens=14, seed=7)
    job = Job(model=model, dtype=torch.bfloat16, sampling=sampling, multiple=16, absorbs=False)
    results = pool.run(generate, 1, job)
    assert furthest(results) < 1e-4
    for completion, experts in zip(results[0].completions, results[0].experts, strict=True):
        for layer, choices in experts.items():
            assert torch.equal(completion.experts[layer], choices)


@pytest.mark.parametrize("model, tolerance", [("gqa", 1e-3), ("dense", 0.03)])
def test_bfloat16_log_probabilities_are_near_those_of_training_otherwise(pool, model, tolerance):
    """Absorbed projections round other products than training does; the weights here are ten times the usual ones."""
    job = Job(model=model, dtype=torch.bfloat16, sampling=Sampling(max_tokens=14, seed=7), multiple=16)
    (result,) = pool.run(generate, 1, job)
    pairs = zip(result.completions, result.log_probs, strict=True)
    assert torch.cat([(c.log_probs - other).abs() for c, other in pairs]).mean() < tolerance


@pytest.mark.parametrize("layout", ["tp2", "pp2_ep2"])
def test_kept_keys_and_values_give_the_same_tokens(pool, layout):
    world_size, parallel = LAYOUTS[layout]
    assert_same(pool.run(generate, world_size, Job(parallel=parallel, absorbs=False)), single(pool, "mla", SAMPLED))
