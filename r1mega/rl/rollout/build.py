"""The rollout engine that the settings ask for."""

from __future__ import annotations

from r1mega.config import Config
from r1mega.data.tokenizer import Tokenizer
from r1mega.parallel_state import ParallelState
from r1mega.rl.rollout.engine import RolloutEngine
from r1mega.rl.rollout.native import NativeEngine
from r1mega.train.learner import Learner
from r1mega.train.stages import DTYPES

MOST_ROWS = 1024


def build_engine(config: Config, state: ParallelState, learner: Learner, tokenizer: Tokenizer) -> RolloutEngine:
    """A collective call."""
    rl = config.rl
    if rl.engine == "vllm":
        from r1mega.rl.rollout.vllm import VllmEngine

        return VllmEngine(config, state, learner, tokenizer.vocab_size)
    return NativeEngine(
        learner.stages,
        learner.table,
        state,
        config.model,
        DTYPES[config.train.dtype],
        tokenizer.vocab_size,
        rl.max_rows or MOST_ROWS,
        with_experts=rl.routing_replay,
        absorbs=rl.cache == "latent",
    )
