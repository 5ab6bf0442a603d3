"""The benchmarks of the MoE layer: tables, JSON and picture, on sizes that take no time."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import imbalance, moe_layer, routing
from benchmarks.peers import routing_functions

ROUTING = ["--tokens", "12", "--hidden", "8", "--experts", "4", "--top_k", "2", "--rounds", "1"]
TINY = [*ROUTING, "--width", "6"]
FLOAT = torch.float32
ROUTED = ("route", "permute", "combine")


def test_the_layer_benchmark_has_every_stage_both_ways_and_checks_the_results(tmp_path, monkeypatch, capsys):
    output = tmp_path / "layer.json"
    monkeypatch.setattr(moe_layer, "machine_rates", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(sys, "argv", ["moe_layer.py", *TINY, "--no_megatron", "--output", str(output)])
    assert moe_layer.main() == 0
    found = json.loads(output.read_text())
    names = ["gate", "route", "permute", "gate_up", "swiglu", "gate_up_swiglu", "down", "combine"]
    assert [line["stage"] for line in found["stages"]] == names * 2
    assert all((line["floor_bytes"] > 0) != (line["flops"] > 0) for line in found["stages"])
    assert all(line["moved_bytes"] >= line["floor_bytes"] for line in found["stages"])
    for line in found["stages"]:
        assert line["peers"].keys() == ({"PyTorch", "megatron-core"} if line["stage"] in ROUTED else {"PyTorch"})
    assert {"r1mega", "products alone", "PyTorch's operations"} == found["layers"].keys()
    assert found["largest_difference"] < 1e-4
    assert "times the products alone (aim: 1.1)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_routing_benchmark_has_every_stage_both_ways_beside_every_peer(dtype, tmp_path, monkeypatch, capsys):
    output = tmp_path / "routing.json"
    monkeypatch.setattr(routing, "machine_rates", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(sys, "argv", ["routing.py", *ROUTING, "--dtype", dtype, "--output", str(output)])
    assert routing.main() == 0
    found, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert [(line["stage"], line["direction"]) for line in found["stages"]] == [
        (name, direction) for direction in ("forward", "backward") for name in ROUTED
    ]
    for line in found["stages"]:
        assert line["moved_bytes"] >= line["floor_bytes"] > 0 and line["peers"].keys() == {"PyTorch", "megatron-core"}
    assert found["paths"].keys() == {"r1mega", "r1mega, PyTorch only", "PyTorch", "megatron-core"}
    assert "moved MB" in printed and "of 2 peers take 3 times as long" in printed


def test_the_routing_benchmark_runs_where_tokens_are_as_wide_as_there_are_experts(monkeypatch):
    monkeypatch.setattr(routing, "machine_rates", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(sys, "argv", ["routing.py", *ROUTING, "--hidden", "4"])
    assert routing.main() == 0


@pytest.mark.parametrize("what", ["route", "permute", "combine"])
def test_a_peer_whose_results_differ_fails_the_routing_benchmark(what, monkeypatch, capsys):
    right = getattr(routing_functions.PyTorch, what)

    def wrong(*arguments):
        found = right(*arguments)
        return (2 * found[0], *found[1:]) if what == "permute" else 2 * found

    monkeypatch.setattr(routing_functions.PyTorch, what, wrong)
    monkeypatch.setattr(routing, "machine_rates", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(sys, "argv", ["routing.py", *ROUTING])
    assert routing.main() == 1


def test_transformer_engine_is_called_as_it_wants_where_it_is_installed(monkeypatch):
    """With functions of its names and arguments that megatron-core's stand in for."""
    given = routing.random_problem({"tokens": 12, "hidden": 8, "experts": 4, "top_k": 2}, torch.device("cpu"), FLOAT)
    megatron = routing_functions.Megatron(given)

    class Router:
        @staticmethod
        def fused_topk_with_score_function(
            logits, topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias
        ):
            given = {"use_pre_softmax": use_pre_softmax, "num_groups": num_groups, "group_topk": group_topk}
            given |= {"scaling_factor": scaling_factor, "score_function": score_function, "expert_bias": expert_bias}
            return megatron.functions.topk_routing_with_score_function(logits, topk, **given)

    class Permutation:
        @staticmethod
        def moe_permute_with_probs(inp, probs, routing_map, num_out_tokens=-1):
            return megatron.functions.permute(inp, routing_map, probs=probs, num_out_tokens=num_out_tokens)

        @staticmethod
        def moe_unpermute(inp, row_id_map, merging_probs=None, restore_shape=None, map_type="mask"):
            return megatron.functions.unpermute(inp, row_id_map, restore_shape)

    modules = {"router": Router, "permutation": Permutation}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine.pytorch.{name}", module)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", type(sys)("transformer_engine.pytorch"))
    monkeypatch.setitem(sys.modules, "transformer_engine", type(sys)("transformer_engine"))
    assert "Transformer Engine" not in routing_functions.installed_peers(given)  # on a GPU only
    monkeypatch.setattr(routing_functions, "runs_on_gpu", lambda given: True)
    assert routing.largest_difference(given, routing.paths(given)) < 1e-6
    assert "Transformer Engine" in routing.paths(given)


def test_layers_that_disagree_fail_the_benchmark(monkeypatch, capsys):
    right = moe_layer.torch_layer
    monkeypatch.setattr(moe_layer, "machine_rates", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(moe_layer, "torch_layer", lambda *arguments: tuple(2 * t for t in right(*arguments)))
    monkeypatch.setattr(sys, "argv", ["moe_layer.py", *TINY, "--no_megatron", "--only", "layers"])
    assert moe_layer.main() == 1


def test_imbalance_is_drawn_and_tabulated(tmp_path):
    cell = {"ranks_max_over_mean": 1.5, "cpu_seconds_of_ranks": [0.002, 0.001], "step_seconds": 0.0035}
    placements = dict.fromkeys(imbalance.PLACEMENTS, cell)
    lines = [{"skew": s, "experts_max_over_mean": 2.0, "placements": placements} for s in (0.0, 1.0)]
    imbalance.plot(lines, tmp_path / "imbalance.png")
    assert (tmp_path / "imbalance.png").read_bytes().startswith(b"\x89PNG")
    table = imbalance.table(lines)
    assert [table.count(name) for name in ("step ms", "CPU ms", "rows")] == [3, 3, 3]
    assert table.count("3.50      2.00    1.50") == 6


def test_what_cannot_be_shared_evenly_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["imbalance.py", "--ranks", "3"])
    with pytest.raises(SystemExit):
        imbalance.parse_arguments()
    assert "--experts=32: must be a multiple of --ranks (3)" in capsys.readouterr().err
