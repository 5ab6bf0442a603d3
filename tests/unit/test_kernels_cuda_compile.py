"""Each CUDA kernel compiles for three kinds of GPUs inside limits, and the library loads where there is no GPU."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from r1mega.kernels import cuda
from tools.build_cuda import SOURCES, BuildFailed, build, find_nvcc

# The most registers a thread and bytes of shared memory a block. 1,024 threads fit with at most 64 registers.
LIMITS = {
    "route_kernel<2>": (64, 32768),
    "route_kernel<4>": (64, 32768),
    "route_kernel<8>": (64, 40960),
    "route_kernel<12>": (128, 32768),
    "route_kernel<24>": (128, 32768),
    "route_backward_kernel": (40, 12288),
    "scan_kernel": (40, 8320),
    "permute_kernel<uint4>": (56, 0),
    "permute_kernel<unsigned long>": (48, 0),
    "permute_kernel<unsigned int>": (40, 0),
    "permute_kernel<unsigned short>": (40, 0),
    "permute_kernel<unsigned char>": (40, 0),
}
ARCHS = ("80", "90a", "100a")
NAMES = {"5uint4": "uint4", "m": "unsigned long", "j": "unsigned int", "t": "unsigned short", "h": "unsigned char"}


def nvcc() -> str:
    path = find_nvcc()
    if path is None:
        pytest.skip("needs nvcc")
    return path


def readable(symbol: str) -> str:
    """``_ZN6r1mega12route_kernelILi8EEEvNS_9RoutePlanE`` is ``route_kernel<8>``."""
    found = re.match(r"_ZN6r1mega\d+([a-z_]+_kernel)(?:I(?:Li(\d+)E|(5uint4|[mjth]))E)?", symbol)
    assert found, symbol
    argument = found[2] or NAMES.get(found[3])
    return f"{found[1]}<{argument}>" if argument else found[1]


def parse(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """Of each architecture and kernel in ptxas' report its registers, and bytes of stack, spills and shared memory."""
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        symbol, arch = re.match(r"(\w+)' for 'sm_(\w+)'", part).groups()
        number = lambda pattern, part=part: int((re.search(pattern, part) or [0, 0])[1])  # noqa: E731
        kernels[arch, readable(symbol)] = {
            "registers": number(r"Used (\d+) registers"),
            "shared": number(r"(\d+) bytes smem"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        }
    return kernels


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("cuda") / "_cuda.so"
    return path, build(nvcc(), list(ARCHS), path, "-Xptxas=-v")


def test_every_kernel_stays_inside_its_limits_on_every_architecture(built: tuple[Path, str]) -> None:
    kernels = parse(built[1])
    assert set(kernels) == {(arch, name) for arch in ARCHS for name in LIMITS}
    for (arch, name), used in kernels.items():
        registers, shared = LIMITS[name]
        assert used["stack"] == used["spills"] == 0, (arch, name, used)
        assert 0 < used["registers"] <= registers and used["shared"] <= shared, (arch, name, used)


def test_the_compiler_has_no_complaint(built: tuple[Path, str]) -> None:
    assert "warning" not in built[1].lower()


def test_the_library_loads_without_a_gpu_and_has_every_function(built: tuple[Path, str]) -> None:
    library = cuda.open_library(built[0])
    assert all(hasattr(library, f"r1mega_{name}") for name in ("route", "route_backward", "scan", "permute"))
    needed = subprocess.run(["ldd", built[0]], capture_output=True, text=True).stdout
    assert "libcuda" not in needed and "not found" not in needed


def test_a_build_that_fails_leaves_the_old_library(tmp_path: Path) -> None:
    path = tmp_path / "_cuda.so"
    path.write_text("old")
    with pytest.raises(BuildFailed, match="no-such-flag"):
        build(nvcc(), ["90a"], path, "--no-such-flag")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_numbers_of_python_and_cuda_are_the_same() -> None:
    text = (SOURCES / "device.h").read_text() + (SOURCES / "kernels.cu").read_text()
    for name, value in (
        ("kTileTokens", cuda.TILE_TOKENS), ("kMaxExperts", cuda.MAX_EXPERTS), ("kMaxTopK", cuda.MAX_TOP_K),
    ):  # fmt: skip
        assert f"constexpr int {name} = {value};" in text
    assert cuda.MAX_GROUPS == 32 and f"return {cuda.INTERFACE};" in text
    assert ctypes.sizeof(ctypes.c_int) == 4
