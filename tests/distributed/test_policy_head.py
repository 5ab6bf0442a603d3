"""The policy head with its vocabulary cut over tensor-parallel ranks: one process's numbers, the same on every rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from r1mega.kernels import native, policy_chunks
from r1mega.kernels.policy_head import policy_head, policy_log_probs, reference_policy_head
from r1mega.parallel_state import Layout, ParallelState
from r1mega.pipeline.weight_gradient import WeightGradientStore
from r1mega.rl import LossOptions, grpo_loss_from_hidden
from r1mega.tensor_parallel.collectives import gather_tokens
from r1mega.tensor_parallel.layers import Linear

B, L, H, V = 4, 6, 5, 48
T = B * L
OPTIONS = LossOptions(kl_coefficient=0.1, entropy_coefficient=0.2)
VARIANTS = (OPTIONS, dataclasses.replace(OPTIONS, ratio="sequence"), LossOptions(kl_coefficient=0, cispo=True))


class Problem:
    """The same on every rank."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        wide = torch.promote_types(dtype, torch.float32)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight = random(T, H).to(dtype).requires_grad_(), random(V, H).to(dtype).requires_grad_()
        self.targets = torch.randint(V, (B, L), generator=generator)
        self.mask = torch.rand(B, L, generator=generator) < 0.7
        self.advantages = random(B).to(wide)
        self.advantages[2] = 0
        self.old, self.ref = ((-random(B, L).abs() - 2).to(wide) for _ in range(2))

    def losses(self, log_probs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        weights = self.advantages[rows // L] / T
        return weights * (0.1 * (log_probs - self.old.flatten()[rows])).exp() + weights * entropy

    def grpo(self, hidden: Tensor, weight: Tensor, options: LossOptions, **more: Any) -> Tensor:
        ref = self.ref if options.kl_coefficient else None
        given = self.targets, self.old, ref, self.advantages, self.mask, options
        return grpo_loss_from_hidden(hidden, weight, *given, chunk=5, temperature=0.7, **more)[0]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=10 * tolerance, atol=tolerance)


def part(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    return tensor.chunk(world_size)[rank]


def check_plain_tensors(rank: int, world_size: int, dtype: torch.dtype, tolerance: float) -> list[Tensor]:
    """Results, after comparing everything with the reference on one rank."""
    p, gathered = Problem(dtype), []
    collective = policy_chunks.all_gather

    def counting(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        gathered.append((tuple(tensor.shape), tensor.dtype))
        return collective(tensor, group)

    policy_chunks.all_gather = counting
    try:
        weight = part(p.weight.detach(), rank, world_size).clone().requires_grad_()
        options = {"mask_T": p.mask.flatten(), "temperature": 0.7}
        cut = {"chunk": 5, "group": dist.group.WORLD}
        out = policy_head(p.hidden, weight, p.targets.flatten(), p.losses, **options, **cut)
        grad_hidden, grad_weight = torch.autograd.grad(out.loss, (p.hidden, weight))
        again = policy_log_probs(p.hidden, weight, p.targets.flatten(), **options, **cut)
    finally:
        policy_chunks.all_gather = collective
    counted = int(p.mask.sum())
    wide = torch.promote_types(dtype, torch.float32)
    assert gathered == 2 * [((min(5, counted - start), 4), wide) for start in range(0, counted, 5)]
    assert torch.equal(again[0], out.log_probs_T) and torch.equal(again[1], out.entropy_T)
    expected = reference_policy_head(p.hidden, p.weight, p.targets.flatten(), p.losses, **options)
    wanted = torch.autograd.grad(expected.loss, (p.hidden, p.weight))
    results = [out.loss.detach(), out.log_probs_T, out.entropy_T]
    for value, one in zip(results, (expected.loss, expected.log_probs_T, expected.entropy_T), strict=True):
        assert_close(value, one.detach(), max(tolerance, 1e-6) if dtype == torch.bfloat16 else tolerance)
    share = grad_hidden.clone()
    assert not torch.allclose(share, wanted[0])  # it is this rank's part of the sum alone
    dist.all_reduce(grad_hidden)
    assert_close(grad_hidden, wanted[0], tolerance)
    assert_close(grad_weight, part(wanted[1], rank, world_size), tolerance)
    return results


def check_the_model_s_layers(rank: int, world_size: int) -> list[Tensor]:
    """Tokens cut over the ranks, the head a column-cut ``Linear`` with a store: as the model's last stage has them."""
    p = Problem(torch.float64)
    state = ParallelState(Layout(world_size, tp=world_size))
    head = Linear(H, V, state, "column", dtype=torch.float64)
    assert isinstance(head.weight, DTensor)
    with torch.no_grad():
        head.weight._local_tensor.copy_(part(p.weight, rank, world_size))
    results = []
    for options in VARIANTS:
        expected = p.grpo(p.hidden, p.weight, options)
        wanted = torch.autograd.grad(expected, (p.hidden, p.weight))
        for store in (None, WeightGradientStore()):
            tokens = part(p.hidden.detach(), rank, world_size).clone().requires_grad_()
            group = state.group("tp")
            head.weight.grad = None
            for count in (1, 2):
                loss = p.grpo(gather_tokens(tokens, group), head.weight, options, group=group, store=store)
                loss.backward()
                assert isinstance(head.weight.grad, DTensor) and head.weight.grad.placements == head.weight.placements
                assert_close(head.weight.grad._local_tensor, count * part(wanted[1], rank, world_size), 1e-12)
                assert_close(tokens.grad, count * part(wanted[0], rank, world_size), 1e-12)
            assert_close(loss.detach(), expected.detach(), 1e-12)
            results.append(loss.detach())
    return results


def check_all(rank: int, world_size: int) -> list[list[Tensor]]:
    found = []
    library = native.library
    for implementation in (None, library):
        native.library = implementation
        try:
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
                found.append(check_plain_tensors(rank, world_size, dtype, tolerance))
        finally:
            native.library = library
    return [*found, check_the_model_s_layers(rank, world_size)]


def test_values_are_the_same_on_all_ranks_and_gradients_are_those_of_one_process(pool) -> None:
    ranks = pool.run(check_all, 2)
    for one, other in zip(*ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
