"""The rollout engine in one process: the cache, rows that come and go, what a completion says."""

from __future__ import annotations

import pytest
import torch

from r1mega.config import AttentionConfig, ModelConfig, MoEConfig
from r1mega.data.batch import Batch
from r1mega.model.blocks import list_blocks
from r1mega.model.cache import Cache, DecodeStep, PromptStep
from r1mega.model.init import initialize
from r1mega.model.stage import Stage, build_stage
from r1mega.parallel_state import Layout, ParallelState
from r1mega.pipeline.schedules import gpipe
from r1mega.rl.rollout.engine import Completion, Request, Sampling
from r1mega.rl.rollout.links import linked_ranks
from r1mega.rl.rollout.native import NativeEngine

VOCABULARY = 40
ATTENTION = {
    "mla": AttentionConfig(num_heads=4, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8),
    "mla_q_lora": AttentionConfig(
        num_heads=2, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=4
    ),
    "gqa": AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True),
    "one_kv_head": AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=1),
}
MOE = MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=16, num_shared_experts=1)


def build(
    attention: str = "mla", dtype: torch.dtype = torch.float64, moe: MoEConfig = MOE
) -> tuple[Stage, ModelConfig]:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        first_dense_layers=1,
        ffn_hidden_size=32,
        init_std=0.3,
        attention=ATTENTION[attention],
        moe=moe,
    )
    state = ParallelState.single_process()
    stage = build_stage(config, state, list_blocks(config, 16), dtype, "cpu")
    initialize(stage, config, seed=0)
    return stage, config


def make_engine(stage: Stage, config: ModelConfig, dtype: torch.dtype = torch.float64, **settings) -> NativeEngine:
    state = ParallelState.single_process()
    return NativeEngine({0: stage}, gpipe(1, 1), state, config, dtype, VOCABULARY, **settings)


def requests(num_samples: int = 4) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 7, 1, 5, 12]
    prompts = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompt, key, num_samples) for key, prompt in enumerate(prompts)]


def same(one: list[Completion], two: list[Completion]) -> bool:
    def said(completions: list[Completion]) -> list[object]:
        return [(c.key, c.sample, c.prompt, c.tokens, c.finished) for c in completions]

    def experts(completions: list[Completion]) -> list[object]:
        return [{layer: part.tolist() for layer, part in c.experts.items()} for c in completions]

    return said(one) == said(two) and experts(one) == experts(two)


@pytest.mark.parametrize("absorbs", [True, False])
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_step_with_the_cache_equals_the_whole_forward(attention, absorbs):
    stage, config = build(attention)
    lengths = torch.tensor([6, 2, 4])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (3, 10), generator=generator)

    def logits(ids: torch.Tensor, cache: PromptStep | DecodeStep | None) -> torch.Tensor:
        batch = Batch(ids, None, None, 1, 1, cache=cache)
        return stage((), batch).metrics["logits"].unflatten(0, ids.shape)

    with torch.no_grad():
        whole = logits(tokens, None)
        width = stage.layers["0"].self_attn.entry_width(absorbs)
        cache = Cache([0, 1], 7, width, torch.float64, "cpu", absorbs)
        logits(tokens[:, :6], PromptStep(cache, 6, torch.tensor([0, 1, 1, 2]), first_row=0))
        source = torch.tensor([0, 1, 1, 2])
        for step in range(4):
            positions = lengths[source] + step
            new = tokens[source, positions]
            found = logits(new.unsqueeze(1), DecodeStep(cache, positions, int(positions.max()) + 1))
            torch.testing.assert_close(found.squeeze(1), whole[source, positions], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("max_rows", [1, 3, 4, 9, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_number_of_rows_at_once_changes_nothing(max_rows, temperature):
    stage, config = build()
    sampling = Sampling(temperature, max_tokens=9, seed=4, stop=(0, 1))
    expected = make_engine(stage, config, max_rows=20).generate(requests(), sampling)
    assert same(make_engine(stage, config, max_rows=max_rows).generate(requests(), sampling), expected)
    assert [(c.key, c.sample) for c in expected] == [(key, sample) for key in range(5) for sample in range(4)]


def test_never_more_rows_than_allowed():
    stage, config = build()
    rows = []
    stage.register_forward_hook(lambda module, inputs, output: rows.append(inputs[1].tokens.shape))
    make_engine(stage, config, max_rows=6).generate(requests(), Sampling(max_tokens=6, stop=(0, 1, 2)))
    assert max(num_rows for num_rows, length in rows if length == 1) <= 6


def test_a_prompt_is_read_once_for_all_its_samples():
    stage, config = build()
    shapes = []
    stage.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[1].tokens.shape))
    make_engine(stage, config).generate(requests(6), Sampling(max_tokens=5))
    assert shapes == [(5, 12)] + [(30, 1)] * 4


def test_a_completion_ends_with_its_stop_id_or_is_cut_off():
    stage, config = build()
    stop = (0, 1, 2, 3)
    completions = make_engine(stage, config).generate(requests(), Sampling(max_tokens=8, stop=stop))
    assert {c.finished for c in completions} == {True, False}
    for completion in completions:
        assert completion.finished == (completion.tokens[-1] in stop)
        assert not set(completion.tokens[:-1]) & set(stop)
        assert completion.finished or len(completion.tokens) == 8
        assert completion.log_probs.shape == (len(completion.tokens),)
        num_fed = len(completion.prompt) + len(completion.tokens) - 1
        assert {layer: part.shape for layer, part in completion.experts.items()} == {1: (num_fed, 2)}


def test_completions_are_handed_out_before_all_are_done_and_say_how_fast_it_was():
    stage, config = build()
    engine, seen = make_engine(stage, config, max_rows=4), []
    passes = []
    stage.register_forward_hook(lambda module, inputs, output: passes.append(1))
    found = engine.generate(requests(), Sampling(max_tokens=8), lambda c: seen.append((c.key, c.sample, len(passes))))
    assert {(key, sample) for key, sample, _ in seen} == {(c.key, c.sample) for c in found}
    assert seen[0][2] < len(passes) / 2
    assert engine.report.tokens == 5 * 4 * 8 and engine.report.tokens_per_second > 0


def test_positions_beyond_the_first_memory_of_the_cache():
    stage, config = build()
    prompt = torch.randint(0, VOCABULARY, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    (completion,) = make_engine(stage, config).generate([Request(prompt, 0, 1)], Sampling(temperature=0, max_tokens=90))
    ids = torch.tensor([prompt + completion.tokens])
    with torch.no_grad():
        logits = stage((), Batch(ids, None, None, 1, 1)).metrics["logits"]
    assert logits[49:-1].argmax(1).tolist() == completion.tokens


def test_generation_uses_the_weights_of_the_moment_and_leaves_no_trace():
    stage, config = build()
    engine, sampling = make_engine(stage, config), Sampling(max_tokens=6, seed=1)
    before = engine.generate(requests(), sampling)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.mul_(1.1)
    after = engine.generate(requests(), sampling)
    assert not same(before, after)
    assert same(after, make_engine(stage, config).generate(requests(), sampling))
    assert int(stage.layers["1"].mlp.gate.tokens_per_expert.sum()) == 0
    assert all(parameter.grad is None for parameter in stage.parameters())


def test_experts_are_left_out_where_nobody_wants_them():
    stage, config = build()
    completions = make_engine(stage, config, with_experts=False).generate(requests(), Sampling(max_tokens=3))
    assert all(completion.experts is None for completion in completions)


def test_no_requests_give_no_completions():
    stage, config = build()
    assert make_engine(stage, config).generate([], Sampling()) == []


@pytest.mark.parametrize(
    "given, message",
    [
        ([Request([], 3)], "request 3: needs a token in its prompt"),
        ([Request([1], 3, 0)], "request 3: needs a token in its prompt and a sample"),
        ([Request([1, VOCABULARY], 3)], "request 3: ids must be between 0 and 39"),
        ([Request([1], 3), Request([2], 3)], "two requests have the same key"),
    ],
)
def test_bad_requests_name_themselves(given, message):
    stage, config = build()
    with pytest.raises(ValueError, match=message):
        make_engine(stage, config).generate(given, Sampling())


def test_a_model_that_drops_tokens_is_refused():
    stage, config = build(moe=MoEConfig(num_experts=4, capacity_factor=1.0))
    with pytest.raises(ValueError, match="moe.capacity_factor"):
        make_engine(stage, config)


@pytest.mark.parametrize(
    "layout, expected",
    [
        (Layout(4), [[0], [1], [2], [3]]),
        (Layout(4, tp=2), [[0, 1], [2, 3]]),
        (Layout(4, ep=2), [[0, 1], [2, 3]]),
        (Layout(4, pp=2), [[0, 2], [1, 3]]),
        (Layout(4, pp=2, ep=2), [[0, 1, 2, 3]]),
        (Layout(8, tp=2, ep=4), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (Layout(8, tp=2, pp=2, ep=4), [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (Layout(8, etp=2, ep=2), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_ranks_that_share_messages(layout, expected):
    assert linked_ranks(layout) == expected
