"""examples/huggingface_qwen3_moe.py: transformers' Qwen3-MoE with r1mega's dispatcher says what it said before."""

from __future__ import annotations

import pytest
import torch.distributed as dist


def differences(rank: int, world_size: int, num_experts: int, top_k: int) -> dict[str, float]:
    from examples.huggingface_qwen3_moe import build, largest_difference, parallelise

    model = build(num_experts, top_k)
    parallelise(model, dist.group.WORLD)
    return largest_difference(model, dist.group.WORLD, num_experts, top_k)


@pytest.mark.parametrize("world_size, num_experts, top_k", [(1, 8, 2), (2, 8, 2), (4, 8, 3)])
def test_logits_and_every_gradient_equal_those_of_the_untouched_model(pool, world_size, num_experts, top_k):
    for found in pool.run(differences, world_size, num_experts, top_k):
        assert len(found) > 20
        assert all(difference < 1e-5 for difference in found.values()), found
