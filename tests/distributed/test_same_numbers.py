"""The layout never changes the answer: losses, gradient norm, gathered gradients and weights equal one process's."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from r1mega.config import AttentionConfig, MoEConfig, ParallelConfig
from r1mega.parallel_state import Layout
from tests.distributed.training import GLOBAL_BATCH, Job, Report, tiny_model, train

LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tp=2)),
    "pp2_gpipe": (2, ParallelConfig(pp=2, schedule="gpipe")),
    "pp2_1f1b": (2, ParallelConfig(pp=2)),
    "ep2": (2, ParallelConfig(ep=2)),
    "etp2_tp1": (2, ParallelConfig(etp=2)),
    "tp2_etp1_ep1": (2, ParallelConfig(tp=2, etp=1)),
    "tp2_etp2": (2, ParallelConfig(tp=2, etp=2)),
    "tp2_ep2": (2, ParallelConfig(tp=2, ep=2)),
    "dp4_ep2": (4, ParallelConfig(ep=2)),
    "dp4_ep4": (4, ParallelConfig(ep=4)),
    "tp2_dp2_ep4": (4, ParallelConfig(tp=2, ep=4)),
    "tp4": (4, ParallelConfig(tp=4)),
    "etp2_ep2": (4, ParallelConfig(etp=2, ep=2)),
    "tp2_etp2_ep2": (4, ParallelConfig(tp=2, etp=2, ep=2)),
    "tp4_etp2_ep1": (4, ParallelConfig(tp=4, etp=2)),
    "pp4": (4, ParallelConfig(pp=4)),
    "pp2_ep2": (4, ParallelConfig(pp=2, ep=2)),
    "pp2_tp2_gpipe": (4, ParallelConfig(pp=2, tp=2, schedule="gpipe")),
    "tp2_pp2_ep2_dp2": (8, ParallelConfig(tp=2, pp=2, ep=2)),
    "pp2_etp2_ep2": (8, ParallelConfig(pp=2, etp=2, ep=2)),
    "tp2_pp2_etp4": (8, ParallelConfig(tp=2, pp=2, etp=4)),
    "pp4_tp2_ep2": (8, ParallelConfig(pp=4, tp=2, ep=2)),
    "tp2_dp4_ep8": (8, ParallelConfig(tp=2, ep=8)),
    "dp8_ep8": (8, ParallelConfig(ep=8)),
    "dp8_etp2_ep2": (8, ParallelConfig(etp=2, ep=2)),
    "placement_mtp_apart": (4, ParallelConfig(pp=4, placement="Ett|tt|m|L")),
}


@functools.cache
def reference(pool, tied: bool) -> Report:
    job = Job(model=tiny_model(tie_embeddings=tied))
    report = pool.run(train, 1, job)[0]
    assert min(report.norms) > job.optimizer.clip_grad, "clipping does nothing, so that no layout can get it wrong"
    return report


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def assert_same(report: Report, expected: Report, rtol: float = 1e-9) -> None:
    assert not report.disagreements, "ranks hold different copies of the same parameter or gradient"
    for step, losses in enumerate(expected.losses):
        assert report.losses[step] == pytest.approx(losses, rel=rtol), f"losses of step {step}"
        assert report.norms[step] == pytest.approx(expected.norms[step], rel=rtol), f"gradient norm of step {step}"
        assert report.gradients[step].keys() == expected.gradients[step].keys()
        for name, gradient in expected.gradients[step].items():
            atol = rtol * gradient.abs().max().item()
            assert_close(f"gradient of {name}, step {step}", report.gradients[step][name], gradient, rtol, atol)
    for name, parameter in expected.parameters.items():
        assert_close(name, report.parameters[name], parameter, 1e-7, 1e-9)
    for name, bias in expected.biases.items():
        assert torch.equal(report.biases[name], bias), f"router bias {name}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_float64_steps_equal_the_single_process(pool, name):
    world_size, parallel = LAYOUTS[name]
    sequences_of_rank = GLOBAL_BATCH // Layout.from_config(parallel, world_size).dp
    job = Job(parallel=parallel, microbatch_size=min(2, sequences_of_rank))
    assert_same(pool.run(train, world_size, job)[0], reference(pool, False))


@pytest.mark.parametrize("name", ["tp2", "pp2_1f1b", "pp4", "tp2_pp2_ep2_dp2", "placement_mtp_apart"])
def test_a_tied_head_gives_the_same_numbers_too(pool, name):
    world_size, parallel = LAYOUTS[name]
    report = pool.run(train, world_size, Job(model=tiny_model(tie_embeddings=True), parallel=parallel))[0]
    assert_same(report, reference(pool, True))


@pytest.mark.parametrize("size", [1, 4])
def test_the_microbatch_size_does_not_matter(pool, size):
    report = pool.run(train, 2, Job(parallel=ParallelConfig(pp=2), microbatch_size=size))[0]
    assert_same(report, reference(pool, False))


@pytest.mark.parametrize("padded", [False, True])
def test_dropping_over_capacity_does_not_depend_on_the_layout(pool, padded):
    moe = dict(num_experts=8, top_k=2, ffn_hidden_size=16, capacity_factor=0.7, aux_loss_coefficient=0.1)
    expected = pool.run(train, 1, Job(model=tiny_model(moe=MoEConfig(**moe)), num_steps=2))[0]
    job = Job(
        model=tiny_model(moe=MoEConfig(**moe, pad_to_capacity=padded)), parallel=ParallelConfig(tp=2, ep=2), num_steps=2
    )
    assert_same(pool.run(train, 4, job)[0], expected)


def test_grouped_query_attention_with_bias_and_norm_gives_the_same_numbers(pool):
    attention = AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True)
    softmax = MoEConfig(num_experts=4, top_k=2, ffn_hidden_size=16, score_function="softmax", score_bias=False)
    model = tiny_model(attention=attention, moe=softmax)
    expected = pool.run(train, 1, Job(model=model, num_steps=2))[0]
    for parallel in (ParallelConfig(tp=2, pp=2), ParallelConfig(tp=2, ep=4)):
        assert_same(pool.run(train, 4, Job(model=model, parallel=parallel, num_steps=2))[0], expected)


@pytest.mark.parametrize("tied", [False, True])
def test_clipping_changes_every_step_that_is_compared(pool, tied):
    report = reference(pool, tied)
    loose = Job(model=tiny_model(tie_embeddings=tied))
    loose.optimizer = dataclasses.replace(loose.optimizer, clip_grad=1e9)
    unclipped = pool.run(train, 1, loose)[0]
    assert len(report.norms) == 3 and unclipped.norms[0] == report.norms[0]
    largest = max((unclipped.parameters[name] - value).abs().max() for name, value in report.parameters.items())
    assert largest > 1e-4  # compared to 1e-9


@functools.cache
def reference_curve(pool) -> list[float]:
    report = pool.run(train, 1, Job(num_steps=20, dtype=torch.float32, microbatch_size=8, keep_gradients=False))[0]
    return [losses["loss"] for losses in report.losses]


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_float32_steps_have_the_same_loss_curve(pool, name):
    world_size, parallel = LAYOUTS[name]
    sequences_of_rank = GLOBAL_BATCH // Layout.from_config(parallel, world_size).dp
    size = max(1, sequences_of_rank // min(parallel.pp, 2))  # few microbatches: this test is about the curve
    job = Job(parallel=parallel, num_steps=20, dtype=torch.float32, microbatch_size=size, keep_gradients=False)
    curve = [losses["loss"] for losses in pool.run(train, world_size, job)[0].losses]
    assert curve == pytest.approx(reference_curve(pool), rel=1e-5)


@pytest.mark.parametrize("name", ["tp2", "pp2_ep2"])
def test_bfloat16_with_float32_master_weights_follows_the_float32_curve(pool, name):
    world_size, parallel = LAYOUTS[name]
    report = pool.run(train, world_size, Job(parallel=parallel, num_steps=20, dtype=torch.bfloat16))[0]
    curve = [losses["loss"] for losses in report.losses]
    expected = reference_curve(pool)
    off = [abs(mine - other) / other for mine, other in zip(curve, expected, strict=True)]
    # one process is 1.4 % off at most and 0.6 % in the mean; dispatch over ranks rounds the sums of a token once more
    assert max(off) < 0.03
    assert sum(off) / len(off) < 0.008
    assert curve[-1] < 0.95 * curve[0]
    assert {parameter.dtype for parameter in report.parameters.values()} == {torch.float32}
    assert {gradient.dtype for gradient in report.gradients[0].values()} == {torch.float32}


def forget_the_sum_over_tp(gradients) -> None:
    gradients._whole = []


def forget_the_sum_over_copies(gradients) -> None:
    gradients._copies.sum = lambda named: None


@pytest.mark.parametrize("sabotage, name", [(forget_the_sum_over_tp, "tp2"), (forget_the_sum_over_copies, "pp2_1f1b")])
def test_a_missing_reduction_is_noticed(pool, sabotage, name):
    """The comparison can fail: without one sum the numbers differ."""
    world_size, parallel = LAYOUTS[name]
    # Outside the block below: a job that breaks for another reason must not pass for a difference in numbers.
    report = pool.run(train, world_size, Job(parallel=parallel, sabotage=sabotage))[0]
    with pytest.raises(AssertionError):
        assert_same(report, reference(pool, False))
