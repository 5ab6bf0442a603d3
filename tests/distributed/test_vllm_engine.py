"""Rollouts by a server: no layout changes an answer, new weights arrive, and what goes wrong is said in one line."""

from __future__ import annotations

import math

import pytest

from r1mega.config import MoEConfig, ParallelConfig, RLConfig, VllmConfig
from r1mega.data.tokenizer import train_tokenizer
from tests.distributed.grpo_steps import model_of_rl
from tests.distributed.vllm_engine import Job, Result, generate, move, nothing

LAYOUTS = {"pp2_ep2": (4, ParallelConfig(pp=2, ep=2))}
DENSE = model_of_rl(moe=MoEConfig(), num_mtp_layers=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["to be or not to be, that is the question " * 20], 300, path)
    return str(path)


@pytest.fixture(scope="module")
def single(pool, tokenizer, tmp_path_factory) -> Result:
    return pool.run(generate, 1, Job(tmp_path_factory.mktemp("single"), tokenizer, syncs=(nothing, move)))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_an_answer(pool, layout, single, tokenizer, tmp_path):
    world_size, parallel = LAYOUTS[layout]
    results = pool.run(generate, world_size, Job(tmp_path, tokenizer, parallel))
    wanted = {(c.key, c.sample): c for c in single.completions[0]}
    found = set()
    for result in results:
        assert result.differences[0] < 1e-4
        assert sorted(result.order[0]) == [(c.key, c.sample) for c in result.completions[0]]
        for completion in result.completions[0]:
            other = wanted[completion.key, completion.sample]
            found.add((completion.key, completion.sample))
            assert (completion.tokens, completion.finished) == (other.tokens, other.finished)
            assert completion.log_probs.equal(other.log_probs)
            assert completion.experts.keys() == other.experts.keys() == {1, 2, 3}
            assert all(completion.experts[layer].equal(other.experts[layer]) for layer in other.experts)
            assert other.experts[1].shape == (len(other.prompt) + len(other.tokens) - 1, 3)
    assert found == set(wanted)


def test_a_completion_ends_with_its_stop_id_or_at_the_longest_length(single):
    finished = [c for c in single.completions[0] if c.finished]
    cut = [c for c in single.completions[0] if not c.finished]
    assert finished and cut
    assert all(c.tokens[-1] in (3, 4, 9) and not {3, 4, 9} & set(c.tokens[:-1]) for c in finished)
    assert all(len(c.tokens) == 6 and not {3, 4, 9} & set(c.tokens) for c in cut)


def test_other_weights_begin_another_server(single):
    assert single.logs[0] != single.logs[1] and max(single.differences) < 1e-4
    assert [c.tokens for c in single.completions[0]] != [c.tokens for c in single.completions[1]]


def test_other_temperatures_than_the_one_of_the_training_report_no_log_probabilities(single):
    assert all(math.isnan(value) for c in single.other for value in c.log_probs.tolist())
    assert single.other and all(len(c.tokens) == 2 for c in single.other)


def test_a_server_that_reloads_takes_over_new_weights_and_a_repeated_call_is_the_same(pool, tokenizer, tmp_path):
    rl = RLConfig(vllm=VllmConfig(sync="reload"))
    job = Job(tmp_path, tokenizer, model=DENSE, rl=rl, syncs=(nothing, nothing, move))
    result = pool.run(generate, 1, job)[0]
    assert not result.error and max(result.differences) < 1e-4
    first, second, third = ([c.tokens for c in part] for part in result.completions)
    assert len(set(map(tuple, first))) == len(first)
    assert first == second and third != first
    assert result.logs[0] == result.logs[1] == result.logs[2], "one server for all"
    assert all(c.experts is None for part in result.completions for c in part)


FAULTS = {
    "stale": (
        RLConfig(vllm=VllmConfig(sync="reload")), "vLLM does not compute with the weights of the training: after "
        "sync 2 (reload) its log-probabilities differ by ",
    ),
    "refuse": (RLConfig(), "vLLM ended at its start (status 1): ValueError: the weights are of the wrong colour; see "),
    "die": (RLConfig(), "vLLM's server has died (status 3): RuntimeError: out of luck; see "),
    "hang": (
        RLConfig(vllm=VllmConfig(request_timeout=0.3)), "vLLM's server: no answer within 0.3 s "
        "(rl.vllm.request_timeout); see ",
    ),
    "no_experts": (RLConfig(), "vLLM's server: it reports no choices of experts; set rl.routing_replay to false; see "),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_is_said_in_one_line_on_all_ranks(pool, fault, tokenizer, tmp_path):
    rl, message = FAULTS[fault]
    model = model_of_rl(num_mtp_layers=0) if fault == "no_experts" else DENSE
    job = Job(tmp_path, tokenizer, model=model, rl=rl, fault=fault, syncs=(nothing, move))
    results = pool.run(generate, 2, job)
    assert len({result.error for result in results}) == 1
    assert results[0].error.startswith(message) and "\n" not in results[0].error
