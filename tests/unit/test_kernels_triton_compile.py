"""Each Triton kernel, as it is launched for DeepSeek-R1, compiled for three GPUs and held to what it may need.

No GPU is there: this catches what costs speed by accident (a kernel that spills, that needs more registers or shared
memory than before, or whose products stopped using the tensor cores), not slowness as such.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.kernels import triton

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90, 100)
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 65536  # of a multiprocessor

# Registers of a thread and bytes of shared memory that are not to be exceeded, for each capability.
LIMITS: dict[str, tuple[tuple[int, int], ...]] = {}
ON_TENSOR_CORES = tuple(name for name in LIMITS if name.startswith("grouped") and "bfloat16" in name)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, int]]]:
    """What each kernel needs: by capability and name."""
    if not triton._found():
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.unit.triton_compile", *map(str, CAPABILITIES)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_and_stays_inside_its_limits(compiled, capability: int) -> None:
    kernels = compiled[str(capability)]
    assert set(kernels) == set(LIMITS)
    column, exceeded = CAPABILITIES.index(capability), []
    for name, needs in kernels.items():
        registers, shared = LIMITS[name][column]
        if needs["registers"] > registers or needs["shared"] > shared:
            exceeded.append(f"{name}: {needs['registers']} registers, {needs['shared']} bytes of shared memory")
    assert not exceeded, "\n".join(exceeded)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills_and_every_one_fits_the_gpu(compiled, capability: int) -> None:
    for name, needs in compiled[str(capability)].items():
        assert needs["stack"] == 0, name
        assert needs["shared"] <= SHARED_BYTES[capability], name
        assert needs["registers"] * needs["threads"] <= REGISTERS, name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bfloat16_products_run_on_the_tensor_cores(compiled, capability: int) -> None:
    for name in ON_TENSOR_CORES:
        assert compiled[str(capability)][name]["matrix_instructions"] > 0, name
