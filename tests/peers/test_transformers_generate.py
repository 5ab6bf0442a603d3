"""Greedy generation with the cache says what transformers' ``generate`` says."""

from __future__ import annotations

import pytest
import torch

from r1mega.parallel_state import ParallelState
from r1mega.pipeline.schedules import gpipe
from r1mega.rl.rollout.engine import Request, Sampling
from r1mega.rl.rollout.native import NativeEngine
from tests.peers.transformers_oracle import COMMON, DEEPSEEK, LLAMA3, QWEN_MOE, load, make_model

KINDS = {
    "deepseek": ("DeepseekV3", DEEPSEEK),
    "deepseek_no_q_lora": ("DeepseekV3", DEEPSEEK | {"q_lora_rank": None, "rope_scaling": None}),
    "llama": ("Llama", COMMON | {"num_key_value_heads": 2, "rope_scaling": LLAMA3}),
    "qwen3_moe": ("Qwen3Moe", COMMON | {"num_key_value_heads": 2, "head_dim": 24, **QWEN_MOE}),
}
LENGTHS, NEW = (5, 11, 3, 20), 24


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind, tmp_path):
    name, settings = KINDS[kind]
    model = make_model(name, **settings)
    model.save_pretrained(tmp_path)
    stage, config = load(tmp_path)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, config.vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]
    engine = NativeEngine(
        {0: stage}, gpipe(1, 1), ParallelState.single_process(), config, torch.float32, config.vocab_size
    )
    ours = engine.generate(
        [Request(prompt, key) for key, prompt in enumerate(prompts)], Sampling(temperature=0, max_tokens=NEW)
    )
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            pad_token_id=0, eos_token_id=None, use_cache=True,
        )  # fmt: skip
        assert completion.tokens == theirs[0, len(prompt) :].tolist()
