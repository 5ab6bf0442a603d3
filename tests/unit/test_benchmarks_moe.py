"""The benchmarks of the MoE layer and of imbalance on sizes that take no time: their tables, JSON and picture."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import imbalance, moe_layer

TINY = ["--tokens", "12", "--hidden", "8", "--experts", "4", "--top_k", "2", "--width", "6", "--rounds", "1"]


def test_the_layer_benchmark_has_every_stage_both_ways_and_checks_the_results(tmp_path, monkeypatch, capsys):
    output = tmp_path / "layer.json"
    monkeypatch.setattr(moe_layer, "machine_rates", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(sys, "argv", ["moe_layer.py", *TINY, "--no_megatron", "--output", str(output)])
    assert moe_layer.main() == 0
    found = json.loads(output.read_text())
    names = ["gate", "route", "permute", "gate_up", "swiglu", "gate_up_swiglu", "down", "combine"]
    assert [line["stage"] for line in found["stages"]] == names * 2
    assert all((line["floor_bytes"] > 0) != (line["flops"] > 0) for line in found["stages"])
    assert {"r1mega", "products alone", "PyTorch's operations"} == found["layers"].keys()
    assert found["largest_difference"] < 1e-4
    assert "times the products alone (aim: 1.1)" in capsys.readouterr().out


def test_layers_that_disagree_fail_the_benchmark(monkeypatch, capsys):
    right = moe_layer.torch_layer
    monkeypatch.setattr(moe_layer, "machine_rates", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(moe_layer, "torch_layer", lambda *arguments: tuple(2 * t for t in right(*arguments)))
    monkeypatch.setattr(sys, "argv", ["moe_layer.py", *TINY, "--no_megatron", "--only", "layers"])
    assert moe_layer.main() == 1


def test_imbalance_is_drawn_and_tabulated(tmp_path):
    cell = {"ranks_max_over_mean": 1.5, "cpu_seconds_of_ranks": [0.002, 0.001]}
    placements = dict.fromkeys(imbalance.PLACEMENTS, cell)
    lines = [{"skew": s, "experts_max_over_mean": 2.0, "placements": placements} for s in (0.0, 1.0)]
    imbalance.plot(lines, tmp_path / "imbalance.png")
    assert (tmp_path / "imbalance.png").read_bytes().startswith(b"\x89PNG")
    assert imbalance.table(lines).count("2.00       1.50") == 6


def test_what_cannot_be_shared_evenly_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["imbalance.py", "--ranks", "3"])
    with pytest.raises(SystemExit):
        imbalance.parse_arguments()
    assert "--experts=32: must be a multiple of --ranks (3)" in capsys.readouterr().err
