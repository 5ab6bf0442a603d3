"""The rows of ``benchmarks/gpu_rows.py``, run on the CPU: their times mean nothing, the operations are the same."""

from __future__ import annotations

import argparse
import warnings

import pytest
import torch

from benchmarks import gpu_rows, gpu_timing, moe_layer

SIZES = argparse.Namespace(
    tokens=64, hidden=32, experts=16, top_k=4, groups=4, kept_groups=2, local_experts=8, width=16
)


@pytest.fixture
def on_cpu(monkeypatch):
    for module in (gpu_rows, gpu_timing):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_rows, "LAYERS", {name: gpu_rows.LAYERS[name] for name in ("plain", "drops over capacity")})
    monkeypatch.setattr(gpu_rows, "cache_bytes", lambda: 4096)
    monkeypatch.setattr(gpu_timing, "ROUNDS", 1)
    monkeypatch.setattr(gpu_rows, "ROUNDS", 1)
    monkeypatch.setattr(gpu_timing, "CALLS", 1)
    monkeypatch.setattr(gpu_timing, "machine_rates", lambda device, dtype: (1e10, 1e11))
    monkeypatch.setattr(gpu_timing, "graph_seconds", lambda works: None)


def by_name(results: list[dict]) -> dict[str, dict]:
    assert not [result for result in results if "error" in result]
    return {result["row"]: result for result in results if "row" in result}


@pytest.mark.usefixtures("on_cpu")
def test_routing_is_measured_both_ways_beside_targets_and_peers(capsys):
    results: list[dict] = []
    assert gpu_rows.run_routing(SIZES, results.append)
    rows = by_name(results)
    names = ("route", "permute", "combine", "weighted combine")
    assert rows.keys() == {"route in cache", *(f"{name}{way}" for name in names for way in ("", " backward"))}
    assert all(row["pytorch_seconds"] and row["floor_bytes"] > 0 for row in rows.values())
    assert rows["route"]["at_most_us"] == 6.0 and rows["route backward"]["met"] is None
    of_copies = [row["at_least"] for name, row in rows.items() if "route" not in name]
    assert of_copies == [0.85] * 6
    assert rows["route"]["floor_bytes"] == 64 * 16 * 4 + 64 * 4 * 8
    assert rows["permute"]["floor_bytes"] == 5 * 64 * 32 * 2 + 64 * 4 * 4
    assert rows["combine"]["floor_bytes"] == 5 * 64 * 32 * 2 + 64 * 4 * 8
    table = capsys.readouterr().out
    assert "<= 6 us" in table and ">= 0.85" in table


@pytest.mark.usefixtures("on_cpu")
def test_the_layer_and_each_of_its_stages_is_measured(capsys):
    results: list[dict] = []
    assert gpu_rows.run_layer(SIZES, results.append)
    rows = by_name(results)
    stages = ("gate", "route", "permute", "gate_up", "swiglu", "gate_up_swiglu", "down", "combine")
    assert rows.keys() == {"layer, both ways", *(f"{name}{way}" for name in stages for way in ("", " backward"))}
    layer = rows["layer, both ways"]
    assert layer["at_least"] == 0.65 and layer["flops"] == 18 * 64 * 4 * 32 * 16 and layer["products_alone_seconds"]
    for name in ("gate_up", "swiglu", "gate_up_swiglu", "down"):
        assert rows[name]["pytorch_seconds"] and rows[f"{name} backward"]["pytorch_seconds"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(line for line in lines if line[0] == "gate")[-2] == "-"  # no target


@pytest.mark.usefixtures("on_cpu")
def test_a_row_that_fails_does_not_keep_others_from_being_measured(capsys):
    def fail() -> None:
        raise RuntimeError("no memory")

    results: list[dict] = []
    rows = [gpu_timing.Row("bad", [fail]), gpu_timing.Row("good", [lambda: None], num_bytes=1)]
    assert not gpu_rows.run_rows(rows, gpu_timing.Rates(1.0, 1.0), False, results.append)
    assert results[0] == {"name": "bad", "error": "RuntimeError: no memory"} and results[1]["row"] == "good"


@pytest.mark.usefixtures("on_cpu")
def test_every_wait_of_a_layer_is_counted_with_its_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    original = moe_layer.MoELayer._run_experts

    def waiting(self, *given):
        warnings.warn("called a synchronizing CUDA operation (function warn_or_error_on_sync)", stacklevel=1)
        return original(self, *given)

    monkeypatch.setattr(moe_layer.MoELayer, "_run_experts", waiting)
    results: list[dict] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the first step, which is not counted
        assert gpu_rows.run_waits(SIZES, results.append)
    assert [result["layer"] for result in results] == ["plain", "drops over capacity"]
    assert all(len(result["waits"]) == 1 and "r1mega/moe/layer.py:" in result["waits"][0] for result in results)
    assert modes == ["warn", "default"] * 2


def test_inputs_together_are_larger_than_the_cache():
    for cache, one in ((60 << 20, 8 << 20), (1, 5), (50 << 20, 10**9)):
        number = gpu_rows.sets(cache, one)
        assert number * one >= 4 * cache > (number - 1) * one
