"""Builds csrc/cuda with g++, every CUDA thread a fibre, and puts it in the place of the GPU's library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from r1mega.kernels import cuda, native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc/cuda"
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
    compile_host(alone, output, "-O1", "-fPIC", "-shared")


def use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on CPU tensors go to the library at ``path``, as a GPU's tensors do to the real one."""
    found = ctypes.CDLL(str(path))
    found.r1mega_error.restype = ctypes.c_char_p
    monkeypatch.setattr(cuda, "library", found)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(native, "library", None)
