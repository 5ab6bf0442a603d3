"""``r1mega kernels``, and the package where the extension is missing, old or switched off."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r1mega import cli
from r1mega.config import Config
from r1mega.kernels import cuda, native, overview, triton
from r1mega.kernels.overview import OPERATIONS
from r1mega.train import pretrain


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["kernels", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_every_operation_is_listed_and_exists(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    for operation in OPERATIONS:
        assert text.count(f"\n{operation.name} ") == 2  # what it is, and what runs
        assert callable(getattr(importlib.import_module(f"r1mega.kernels.{operation.module}"), operation.name))
    assert native.reason in text and cuda.reason in text


def test_without_the_extension_every_operation_runs_pytorch_and_the_reason_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "reason", "it rains")
    table = json.loads(printed(capsys, "--json"))
    assert table["cpp"] == {"available": False, "reason": "it rains"}
    assert {operation["running"] for operation in table["operations"]} == {"PyTorch"}
    assert all(each["why"] == "no C++ extension" for each in table["operations"] if "C++" in each["implementations"])


@pytest.mark.needs_extension
def test_with_the_extension_every_operation_that_has_cpp_runs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for multiplies in (True, False):
        monkeypatch.setattr(overview, "native_multiplies", lambda multiplies=multiplies: multiplies)
        for operation in json.loads(printed(capsys, "--json"))["operations"]:
            has_cpp = "C++" in operation["implementations"] and (multiplies or operation["module"] != "linear")
            assert operation["running"] == ("C++" if has_cpp else "PyTorch")
            assert operation["why"] and operation["why_on_gpu"] is None


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_products_of_experts_are_said_to_be_pytorch_s_on_the_gpus_for_which_it_has_them(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(triton, "available", lambda: True)
    (operation,) = (operation for operation in OPERATIONS if operation.name == "grouped_linear")
    running = overview.running_on_gpu(operation)
    assert running is not None and running.name == ("PyTorch" if capability[0] in (9, 10) else "Triton")
    assert "grouped_mm" in running.why


def test_what_runs_on_the_gpu_is_said_only_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "reason", "it snows")
    for built, expected in ((True, "CUDA"), (False, "PyTorch")):
        monkeypatch.setattr(cuda, "library", object() if built else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        table = json.loads(printed(capsys, "--json"))
        assert table["cuda"] == {"available": built, "reason": "it snows"} and table["gpu"] == "a GPU"
        on_gpu = {operation["name"]: operation["running_on_gpu"] for operation in table["operations"]}
        assert on_gpu["route"] == on_gpu["scan"] == on_gpu["permute"] == expected and on_gpu["linear"] == "PyTorch"
        assert all(operation["why_on_gpu"] for operation in table["operations"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        table = json.loads(printed(capsys, "--json"))
        assert {operation["running_on_gpu"] for operation in table["operations"]} == {None}
        assert "no GPU here" in printed(capsys)


@pytest.mark.parametrize("library", ["missing", "of other sources", "broken", "switched off"])
def test_a_cuda_library_that_cannot_be_used_is_no_error(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("R1MEGA_CUDA", raising=False)
    path = tmp_path / "_cuda.so"
    monkeypatch.setattr(cuda, "LIBRARY", path)
    if library == "broken":
        path.write_bytes(b"no library")
    elif library == "switched off":
        monkeypatch.setenv("R1MEGA_CUDA", "0")
    elif library == "of other sources":
        path.write_bytes(b"")
        monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(r1mega_interface=lambda: -1))
    found, reason = cuda._load()
    expected = {
        "missing": "not built", "of other sources": "other sources", "broken": "does not load",
        "switched off": "R1MEGA_CUDA=0 is set",
    }  # fmt: skip
    assert found is None and expected[library] in reason
    assert "nvcc" in reason or library == "switched off"


@pytest.mark.parametrize("missing", [False, True])
def test_a_run_says_once_that_the_extension_is_missing_and_nothing_otherwise(
    monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    monkeypatch.setattr(native, "library", None if missing else object())
    monkeypatch.setattr(native, "reason", "it rains")
    state = SimpleNamespace(size=lambda name: 1, layout=SimpleNamespace(world_size=1), device=torch.device("cpu"))
    trainer = SimpleNamespace(config=Config(), state=state, progress=SimpleNamespace(step=0))
    messages: list[str] = []
    pretrain._announce(trainer, SimpleNamespace(message=messages.append))
    assert [message for message in messages if "it rains" in message] == messages[1:]
    assert len(messages) == 1 + missing


def test_an_extension_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("R1MEGA_NATIVE", raising=False)
    monkeypatch.setitem(sys.modules, "r1mega._C", SimpleNamespace(INTERFACE=-1))
    library, reason = native._load()
    assert library is None and "builds it again" in reason


def test_a_missing_extension_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.delenv("R1MEGA_NATIVE", raising=False)
    monkeypatch.setattr(importlib, "import_module", missing)
    library, reason = native._load()
    assert library is None and "compiler" in reason and "make setup" in reason


def test_the_environment_switches_the_extension_off() -> None:
    code = "from r1mega.kernels import native; assert native.library is None; print(native.reason)"
    environment = os.environ | {"R1MEGA_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "R1MEGA_NATIVE=0 is set\n" and run.stderr == ""
