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
from typing import Any

import pytest

from r1mega.kernels import triton

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90, 100)
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 65536  # of a multiprocessor

# Registers of a thread and KiB of shared memory, not to be exceeded: for all three, or for 9.0 where it is a variant.
# Those of Triton 3.9; below, where another version needs more.
LIMITS: dict[str, tuple[tuple[int, int], ...]] = {
    "route float32 normalize bias_E": ((192, 16), (184, 16), (184, 16)),
    "route_backward float32 normalize": ((72, 0), (72, 0), (72, 0)),
    "route float32 softmax normalize": ((184, 16),),
    "route_backward float32 softmax logits_TE grad_sums_E": ((48, 1),),
    "scan bfloat16": ((72, 16), (72, 16), (72, 16)),
    "permute bfloat16": ((40, 0), (40, 0), (40, 0)),
    "sum_rows bfloat16": ((40, 0), (40, 0), (40, 0)),
    "sum_rows bfloat16 weights_TK": ((40, 0), (40, 0), (48, 0)),
    "copy_rows bfloat16": ((24, 0), (24, 0), (24, 0)),
    "weighted_backward bfloat16": ((72, 1), (72, 1), (72, 1)),
    "swiglu bfloat16": ((40, 0), (40, 0), (40, 0)),
    "swiglu_backward bfloat16": ((48, 1), (48, 1), (48, 1)),
    "rms_norm bfloat16": ((48, 1), (40, 1), (40, 1)),
    "rms_norm_backward bfloat16": ((104, 16), (136, 16), (128, 16)),
    "find_tiles bfloat16": ((32, 1), (40, 1), (32, 1)),
    "grouped_matmul bfloat16 gated": ((136, 96), (200, 193), (216, 193)),
    "grouped_matmul bfloat16": ((208, 96), (96, 129), (96, 129)),
    "grouped_matmul bfloat16 straight": ((216, 96), (112, 128), (112, 129)),
    "grouped_outer bfloat16": ((192, 96), (112, 128), (104, 129)),
    "policy_statistics float32": ((80, 1), (64, 1), (80, 1)),
    "policy_gradient bfloat16": ((40, 0), (48, 0), (32, 0)),
    "policy_gradient bfloat16 rows_K": ((40, 0),),
    "policy_gradient float32": ((40, 0),),
    "grouped_matmul float32 gated": ((176, 60),),
    "grouped_matmul float32": ((120, 60),),
    "grouped_matmul float32 straight": ((136, 60),),
    "grouped_outer float32": ((48, 24),),
}  # fmt: skip
LIMITS_OF: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "3.9": LIMITS,
    "3.6": LIMITS | {
        "route float32 normalize bias_E": ((216, 16), (224, 16), (224, 16)),
        "route float32 softmax normalize": ((208, 16),),
        "policy_statistics float32": ((72, 1), (72, 1), (64, 1)),
        "policy_gradient bfloat16": ((48, 0), (40, 0), (40, 0)),
        "policy_gradient bfloat16 rows_K": ((48, 0),),
        "policy_gradient float32": ((48, 0),),
    },
}  # fmt: skip
ON_TENSOR_CORES = tuple(name for name in LIMITS if name.startswith("grouped") and "bfloat16" in name)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Triton's version, and what each kernel needs, by capability and name."""
    if not triton._found():
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.unit.triton_compile", *map(str, CAPABILITIES)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture
def kernels(report: dict[str, Any], capability: int) -> dict[str, dict[str, int]]:
    """What each kernel needs."""
    return report["kernels"][str(capability)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_stays_inside_its_limits(report, kernels, capability: int) -> None:
    of_version = LIMITS_OF.get(report["version"].rpartition(".")[0])
    if of_version is None:
        pytest.skip(f"there are limits for Triton {', '.join(LIMITS_OF)}, not for {report['version']}")
    exceeded: list[str] = []
    limits = {
        name: dict(zip(CAPABILITIES if len(of) == 3 else (90,), of, strict=True)) for name, of in of_version.items()
    }
    assert set(kernels) == {name for name, of in limits.items() if capability in of}
    for name, needs in kernels.items():
        registers, shared = limits[name][capability]
        if needs["registers"] > registers or needs["shared"] > shared * 1024:
            exceeded.append(f"{name}: {needs['registers']} registers, {needs['shared']} bytes of shared memory")
    assert not exceeded, "\n".join(exceeded)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spilling_and_fits_the_gpu(kernels, capability: int) -> None:
    for name, needs in kernels.items():
        assert needs["stack"] == 0, name
        assert needs["shared"] <= SHARED_BYTES[capability], name
        assert needs["registers"] * needs["threads"] <= REGISTERS, name


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_bfloat16_products_run_on_the_tensor_cores(kernels) -> None:
    assert all(kernels[name]["matrix_instructions"] > 0 for name in ON_TENSOR_CORES) and len(ON_TENSOR_CORES) == 4
