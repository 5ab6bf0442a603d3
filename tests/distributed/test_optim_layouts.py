"""Sharding, gradient sums, norm, clipping and AdamW over layouts, against the same on whole tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from r1mega.config import OptimizerConfig
from r1mega.kernels.parameter import local
from r1mega.optim.adamw import AdamW
from r1mega.optim.gradients import Gradients
from r1mega.parallel_state import Layout
from r1mega.train.sharding import named_shards, reduce_gradients, reshard, shard
from tests.distributed import toy_model
from tests.distributed.toy_model import backward, build, local_part, whole_tensor

LAYOUTS = {
    "single": (1, {}, {}),
    "single_tied": (1, {}, {"tied": True}),
    "dp3_uneven": (3, {}, {}),
    "ep2": (2, {"ep": 2}, {}),
    "tp2_dp2": (4, {"tp": 2}, {}),
    "tp2_etp2": (4, {"tp": 2, "etp": 2}, {}),
    "ep2_tp4": (4, {"tp": 4, "ep": 2}, {}),
    "experts_cut_by_rows": (4, {"tp": 2, "pp": 2}, {"num_experts": 3}),
    "pp2_ep2_tied": (4, {"pp": 2, "ep": 2}, {"tied": True}),
    "pp2_tp2_tied": (4, {"pp": 2, "tp": 2}, {"tied": True}),
}
CLIP = 0.5


def train_one_step(rank: int, world_size: int, layout: dict, settings: dict) -> dict:
    """What a rank sees: the norm, and its largest deviations from the whole tensors."""
    stage, parameters, state = build(Layout(world_size, **layout), **settings)
    gradients = Gradients(parameters, state)
    optimizer = AdamW(parameters, OptimizerConfig())
    with torch.no_grad():  # a validation before the first step
        stage(torch.ones(1, toy_model.HIDDEN, dtype=torch.float64))
    backward(stage, state)
    gradients.finish()
    worst = max(_deviation(p.grad.to_local(), local_part(gradient_of(name, p), p)) for name, p in parameters)
    norm = gradients.norm()
    gradients.clip(norm, CLIP)
    clipped = gradients.norm()
    optimizer.step(0.01)
    expected = reference(settings)[1]
    after = max(_deviation(p.to_local(), local_part(expected[name], p)) for name, p in parameters)
    gathers_anew = _gathered_equals(stage, expected)
    return {"gradient": worst, "norm": norm, "clipped": clipped, "after": after, "gathers_anew": gathers_anew}


def _gathered_equals(stage: nn.Module, expected: dict[str, Tensor]) -> bool:
    """Whether a forward after the step sees the new weights."""
    stage(torch.ones(1, toy_model.HIDDEN, dtype=torch.float64))
    norms = {name: p for name, p in stage.named_parameters() if name.endswith(".norm")}
    equal = all(torch.allclose(local(parameter), expected[name]) for name, parameter in norms.items())
    reshard(stage)
    return equal and bool(norms)


def gradient_of(name: str, parameter: Tensor) -> Tensor:
    return whole_tensor(name, tuple(parameter.shape), "gradient")


def _deviation(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item() if expected.numel() else 0.0


def reference(settings: dict) -> tuple[float, dict[str, Tensor]]:
    """Norm and new weights by torch's own clipping and AdamW on whole tensors."""
    experts = settings.get("num_experts", toy_model.EXPERTS)
    shapes = {"embed_tokens.weight": (toy_model.VOCAB, toy_model.HIDDEN)}
    for layer in range(toy_model.LAYERS):
        shapes |= {
            f"layers.{layer}.norm": (toy_model.HIDDEN,),
            f"layers.{layer}.router": (experts, toy_model.HIDDEN),
            f"layers.{layer}.column": (toy_model.WIDTH, toy_model.HIDDEN),
            f"layers.{layer}.row": (toy_model.HIDDEN, toy_model.WIDTH),
            f"layers.{layer}.experts.gate_proj": (experts, toy_model.WIDTH, toy_model.HIDDEN),
            f"layers.{layer}.experts.down_proj": (experts, toy_model.HIDDEN, toy_model.WIDTH),
        }
    whole = {name: nn.Parameter(whole_tensor(name, shape)) for name, shape in shapes.items()}
    for name, parameter in whole.items():
        parameter.grad = gradient_of(name, parameter)
    norm = torch.nn.utils.clip_grad_norm_(whole.values(), CLIP).item()
    config = OptimizerConfig()
    groups = [
        {"params": [p for p in whole.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in whole.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=0.01, betas=(config.beta1, config.beta2), eps=config.eps).step()
    return norm, {name: parameter.detach() for name, parameter in whole.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_norm_clipping_and_step_equal_those_on_whole_tensors(pool, name):
    world_size, layout, settings = LAYOUTS[name]
    norm = reference(settings)[0]
    for seen in pool.run(train_one_step, world_size, layout, settings):
        assert seen["gradient"] < 1e-14
        assert seen["norm"] == pytest.approx(norm, rel=1e-13)
        assert seen["clipped"] == pytest.approx(CLIP, rel=1e-6)
        assert seen["after"] < 1e-13
        assert seen["gathers_anew"]


def count_expert_placements(rank: int, world_size: int, num_experts: int) -> int:
    stage, _, _ = build(Layout(world_size), num_experts=num_experts)
    return stage.layers["0"].experts.gate_proj.placements[0].dim


@pytest.mark.parametrize("num_experts, dim", [(4, 0), (3, 1)])
def test_experts_are_cut_by_rows_where_they_do_not_divide(pool, num_experts, dim):
    assert pool.run(count_expert_placements, 2, num_experts) == [dim, dim]


def reduce_with_missing_gradients(rank: int, world_size: int) -> bool:
    """Rank 0 has a gradient for one parameter only, the other ranks for none."""
    stage, parameters, state = build(Layout(world_size))
    stage(torch.ones(1, toy_model.HIDDEN, dtype=torch.float64))
    if rank == 0:
        norm = stage.layers["1"].norm
        norm.grad = torch.ones_like(norm)
    reduce_gradients(stage)
    gradients = {name: p.grad.to_local() for name, p in parameters}
    ones = gradients.pop("layers.1.norm")
    return bool((ones == 1).all()) and all(not gradient.any() for gradient in gradients.values())


def test_a_parameter_without_a_gradient_gets_zeros_on_all_ranks(pool):
    assert all(pool.run(reduce_with_missing_gradients, 2))


class Accumulating(nn.Module):
    """A linear layer whose weight gradient is added to ``grad`` by hand, microbatch after microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.Linear(6, 4, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.layers["0"](x)


def bfloat16_step(rank: int, world_size: int) -> tuple[str, str, float]:
    from r1mega.parallel_state import ParallelState

    state = ParallelState(Layout(world_size))
    torch.manual_seed(0)
    stage = Accumulating()
    whole = stage.layers["0"].weight.detach().clone()
    shard(stage, state, torch.bfloat16)
    [(_, parameter)] = named_shards([stage])
    inputs = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(rank)).bfloat16()
    seen = ""
    for x in inputs:
        y = stage(x)
        seen = str(y.dtype)
        y.float().square().sum().backward()
    reduce_gradients(stage)
    everyone = [torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(world_size)]
    reference = whole.requires_grad_()
    for x in torch.cat(everyone):
        (x.float() @ reference.bfloat16().float().T).square().sum().backward()
    part = local_part(reference.grad, parameter)
    deviation = _deviation(parameter.grad.to_local(), part) / reference.grad.abs().max().item()
    return seen, str(parameter.grad.dtype), deviation


def test_bfloat16_computes_in_bfloat16_and_sums_gradients_of_float32_master_weights(pool):
    for computed, kept, deviation in pool.run(bfloat16_step, 2):
        assert (computed, kept) == ("torch.bfloat16", "torch.float32")
        assert deviation < 0.02


def many_adamw_steps(rank: int, world_size: int, dtype: torch.dtype) -> float:
    """The largest difference to torch.optim.AdamW after 20 steps, relative to the largest weight."""
    from r1mega.parallel_state import ParallelState

    stage = Accumulating().to(dtype)
    theirs = nn.Parameter(stage.layers["0"].weight.detach().clone())
    shard(stage, ParallelState(Layout(world_size)), dtype)
    parameters = named_shards([stage])
    config = OptimizerConfig()
    ours = AdamW(parameters, config)
    betas = config.beta1, config.beta2
    other = torch.optim.AdamW([theirs], betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)
    for step in range(1, 21):
        theirs.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        parameters[0][1].grad = _like(parameters[0][1], theirs.grad)
        ours.step(0.1 / step)
        other.param_groups[0]["lr"] = 0.1 / step
        other.step()
    return _deviation(parameters[0][1].to_local(), theirs.detach())


def _like(parameter, whole: Tensor):
    from torch.distributed.tensor import DTensor

    local = local_part(whole, parameter).clone()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_equals_torch_bit_for_bit_on_one_process(pool, dtype):
    assert pool.run(many_adamw_steps, 1, dtype) == [0.0]


def norm_of_a_million(rank: int, world_size: int) -> tuple[float, float]:
    from r1mega.parallel_state import ParallelState

    stage = nn.Module()
    stage.weight = nn.Parameter(torch.zeros(1000, 1237))
    stage.forward = lambda x: x
    shard(stage, state := ParallelState(Layout(world_size)), torch.float32)
    parameters = named_shards([stage])
    whole = torch.randn(1000, 1237, generator=torch.Generator().manual_seed(0))
    parameters[0][1].grad = _like(parameters[0][1], whole)
    return Gradients(parameters, state).norm(), whole.double().norm().item()


def test_the_float32_norm_is_as_exact_as_a_float64_sum(pool):
    for found, exact in pool.run(norm_of_a_million, 2):
        assert found == pytest.approx(exact, rel=1e-8)
