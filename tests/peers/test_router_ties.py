"""Equal scores: transformers' and megatron-core's routers choose any of them, r1mega the lowest expert, and no other.

Theirs is ``torch.topk``, whose order among equal values is not defined. So choices are compared modulo ties: the values
(scores plus bias) that are chosen are the same, and so is every expert whose value is greater than the least of them.
Where two groups have the same value and one of them is left out, that is asked of the groups instead.

megatron-core's value of a group is the sum of its best ``topk // group_topk`` values, that of DeepSeek-V3 and of r1mega
of its best two. All sizes here have groups where both are two; elsewhere they are different routers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from r1mega.data.megatron import quiet_import
from r1mega.kernels import cuda, native, triton
from r1mega.kernels.route import RouteOptions, reference_route, route
from tests.peers.test_routers import SIZES, dense, random
from tests.unit.cuda_host import SOURCES, compile_host, use

with quiet_import():
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

ROOT = Path(__file__).parents[2]
# The interpreter and the emulated threads are slow: they get the first of the tokens, more than one tile of them.
TOKENS = {"PyTorch": 10_000, "C++": 10_000, "CUDA": 600, "Triton": 80}
CASES = [(size, function) for size in SIZES for function in ("sigmoid", "softmax")]
IN_THE_INTERPRETER = """
import sys, torch
from r1mega.kernels import triton
from r1mega.kernels.route import RouteOptions, route
assert triton.available()
given = torch.load(sys.argv[1], weights_only=True)
found = []
for logits, bias, options in given:
    choices = route(logits, bias, RouteOptions(*options))
    assert choices.first_row_NE.shape[0] == 2, "another implementation ran"
    found.append((choices.experts_TK, choices.weights_TK))
torch.save(found, sys.argv[2])
"""


@dataclass
class Case:
    """Logits and biases with many equal values, which every implementation computes alike.

    Scores of a sigmoid are 0, 1/2 and 1, biases eighths: no value and no sum of two is rounded. The logits of a softmax
    are multiples of 1/2: what is not equal is far apart.
    """

    logits_TE: Tensor
    bias_E: Tensor | None
    options: RouteOptions

    @classmethod
    def of(cls, size: tuple[int, ...], function: str, num_tokens: int = 10_000) -> Case:
        num_experts, top_k, num_groups, top_k_groups = size
        logits = random(10_000, num_experts)[:num_tokens]
        options = RouteOptions(top_k, function, num_groups, top_k_groups, function == "sigmoid", 2.5)
        if function == "softmax":
            return cls((logits * 2).round() / 2, None, options)
        steps = torch.tensor([-200.0, 0.0, 40.0])
        return cls(steps[(logits.clamp(-1, 1).round() + 1).long()], (random(num_experts) * 4).round() / 8, options)

    @property
    def values(self) -> Tensor:
        scores = self.logits_TE.sigmoid() if self.options.score_function == "sigmoid" else self.logits_TE.softmax(1)
        return scores if self.bias_E is None else scores + self.bias_E

    @property
    def of_groups(self) -> Tensor:
        return self.values.unflatten(1, (self.options.num_groups, -1)).topk(2).values.sum(2)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA sources, compiled for the CPU."""
    path = tmp_path_factory.mktemp("cuda_host") / "host.so"
    compile_host(SOURCES / "kernels.cu", path, "-O1", "-fPIC", "-shared")
    return path


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, Tensor]]:
    """Choices and weights of the Triton kernel for each case; Triton decides at its import whether it interprets."""
    if not triton._found():
        pytest.skip("Triton is not installed")
    folder = tmp_path_factory.mktemp("triton")
    cases = [Case.of(*case, TOKENS["Triton"]) for case in CASES]
    torch.save([(c.logits_TE, c.bias_E, tuple(vars(c.options).values())) for c in cases], folder / "given")
    environment = os.environ | {"TRITON_INTERPRET": "1", "R1MEGA_NATIVE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IN_THE_INTERPRETER, folder / "given", folder / "found"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "found", weights_only=True)


@pytest.fixture(params=CASES, ids=str)
def described(request: pytest.FixtureRequest) -> tuple[tuple[int, ...], str]:
    return request.param


@pytest.fixture(params=TOKENS)
def decided(request: pytest.FixtureRequest, described, monkeypatch) -> tuple[Case, Tensor, Tensor]:
    """A case, and the experts and weights that an implementation decides on."""
    name = request.param
    case = Case.of(*described, TOKENS[name])
    given = case.logits_TE, case.bias_E, case.options
    if name == "Triton":
        return case, *request.getfixturevalue("interpreted")[CASES.index(described)]
    if name == "C++" and native.library is None:
        pytest.skip(native.reason)
    if name == "CUDA":
        use(request.getfixturevalue("host"), monkeypatch.setattr)
        assert cuda.takes_route(*given)
    choices = (reference_route if name == "PyTorch" else route)(*given)
    return case, choices.experts_TK, choices.weights_TK


def test_of_equal_values_the_lower_expert_and_of_equal_groups_the_lower_one_is_chosen_best_first(decided):
    case, experts, _ = decided
    options, values = case.options, case.values.numpy()
    if options.num_groups > 1:
        of_groups = case.of_groups.numpy()
        order = np.lexsort((np.broadcast_to(np.arange(options.num_groups), of_groups.shape), -of_groups))
        kept = np.zeros(of_groups.shape, bool)
        np.put_along_axis(kept, order[:, : options.top_k_groups], True, 1)
        values = np.where(kept.repeat(values.shape[1] // options.num_groups, 1), values, -np.inf)
    order = np.lexsort((np.broadcast_to(np.arange(values.shape[1]), values.shape), -values))
    assert np.array_equal(experts.numpy(), order[:, : options.top_k])


def test_choices_and_weights_equal_megatron_core_modulo_equal_values(decided):
    case, experts, weights = decided
    options = case.options
    grouped = options.num_groups > 1
    assert not grouped or options.top_k // options.top_k_groups == 2, "another router, see above"
    expected, chosen = topk_routing_with_score_function(
        case.logits_TE, options.top_k, use_pre_softmax=True, num_groups=options.num_groups if grouped else None,
        group_topk=options.top_k_groups if grouped else None, scaling_factor=options.factor,
        score_function=options.score_function, expert_bias=case.bias_E,
    )  # fmt: skip
    theirs = chosen.nonzero()[:, 1].view_as(experts)
    assert_equal_modulo_ties(case, experts, weights, theirs, expected.gather(1, theirs))


@pytest.mark.parametrize("described", [case for case in CASES if case[1] == "sigmoid"], ids=str, indirect=True)
def test_choices_and_weights_equal_transformers_deepseek_v3_modulo_equal_values(decided):
    case, experts, weights = decided
    options, num_experts = case.options, case.logits_TE.shape[1]
    config = DeepseekV3Config(
        hidden_size=num_experts, n_routed_experts=num_experts, num_experts_per_tok=options.top_k,
        n_group=options.num_groups, topk_group=options.top_k_groups, norm_topk_prob=options.normalize,
        routed_scaling_factor=options.factor,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))  # so that hidden states are logits
        router.e_score_correction_bias.copy_(case.bias_E)
        logits, their_weights, theirs = router(case.logits_TE)
    assert torch.equal(logits, case.logits_TE)
    assert_equal_modulo_ties(case, experts, weights, theirs, their_weights)


def assert_equal_modulo_ties(
    case: Case, ours_TK: Tensor, weights_TK: Tensor, theirs_TK: Tensor, their_weights_TK: Tensor
) -> None:
    values, options = case.values, case.options
    of_groups = case.of_groups.sort(1, descending=True).values
    least_group = of_groups[:, options.top_k_groups - 1 :][:, :1]
    clear = torch.ones(len(values), dtype=torch.bool)
    if options.top_k_groups < options.num_groups:
        clear = of_groups[:, options.top_k_groups] != least_group[:, 0]
    ours, theirs = (values.gather(1, chosen).sort(1).values for chosen in (ours_TK, theirs_TK))
    assert torch.equal(ours[clear], theirs[clear])
    marks = torch.ones_like(values)
    by_us, by_them = (dense(chosen, marks.gather(1, chosen), values.shape[1]) for chosen in (ours_TK, theirs_TK))
    greater = values > ours[:, :1]
    assert torch.equal((by_us * greater)[clear], (by_them * greater)[clear])
    size = values.shape[1] // options.num_groups
    for chosen in (ours_TK, theirs_TK):
        assert (case.of_groups.gather(1, chosen // size) >= least_group).all()
    same = (by_us == by_them).all(1)
    actual, expected = (
        dense(chosen, weights, values.shape[1])[same]
        for chosen, weights in ((ours_TK, weights_TK), (theirs_TK, their_weights_TK))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    # The test tests something: there are tokens of each kind, and many whose last choice is one of several.
    tied = ((values == ours[:, :1]).sum(1) > 1) & clear
    assert same.sum() > 0 and clear.sum() > len(values) // 10 and tied.sum() > len(values) // 10
