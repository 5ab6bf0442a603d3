"""Builds csrc/cuda with g++, every CUDA thread a fibre, and puts it in the place of the GPU's library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r1mega.kernels import cuda, native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc/cuda"
SEED = "R1MEGA_EMULATION_SEED"
STRUCTURES = {
    "route": "RouteArguments", "route_backward": "RouteBackwardArguments", "scan": "ScanArguments",
    "permute": "PermuteArguments",
}  # fmt: skip


def compile_host(source: Path, output: Path, *flags: str) -> None:
    """A shared library, or with ``flags`` something else; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    command = [compiler, "-x", "c++", "-std=c++17", "-U_FORTIFY_SOURCE", *flags, str(source), "-o", str(output)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def compile_one(kernel: str, sources: Path, output: Path) -> None:
    """A library of one kernel alone, from the sources in another folder."""
    text = f"""
        #include "{kernel}.h"
        extern "C" const char* r1mega_error(int error) {{ return cudaGetErrorString(error); }}
        extern "C" int r1mega_{kernel}(const r1mega::{STRUCTURES[kernel]}* a, void* stream) {{
          return r1mega::{kernel}(*a, stream);
        }}"""
    alone = sources / "alone.cu"
    alone.write_text(text)
    compile_host(alone, output, "-O0", "-fPIC", "-shared")


def use(path: Path, set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """From now on CPU tensors go to the library at ``path``, as a GPU's tensors do to the real one."""
    found = ctypes.CDLL(str(path))
    found.r1mega_error.restype = ctypes.c_char_p
    set_attribute(cuda, "library", found)
    set_attribute(cuda, "DEVICE", "cpu")
    set_attribute(native, "library", None)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed numbers, the same in each run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def stepped(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and biases with many equal ones, and otherwise far more than a rounding error apart."""
    return (random(*shape, seed=seed) * 2).round() / 2, (random(shape[1], seed=seed) * 4).round() / 4
