"""Compiles each Triton kernel as r1mega launches it, without a GPU, and prints what it needs as JSON.

Runs in a process of its own, since Triton decides when it is imported whether it interprets. The launchers are called
with tensors of the meta device (so they read no number from the device), and their launches are compiled instead.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from r1mega.kernels.route import RouteOptions
from r1mega.kernels.triton import combine, grouped, permute, policy_head, rms_norm, route, swiglu

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
VARIANTS_OF = 90
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
T, K, H, E, F, LOCAL = 8192, 8, 7168, 256, 2048, 32
V, CHUNK = 129280, 2048
R = T * K
OPTIONAL = {"_route": ["bias_E"], "_sum_rows": ["weights_TK"], "_route_backward": ["logits_TE", "grad_sums_E"],
            "_policy_gradient": ["rows_K"]}  # fmt: skip
BF16, F32, I64, I32 = torch.bfloat16, torch.float32, torch.int64, torch.int32


def on_meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_all(variants: bool) -> None:
    """Every kernel at the sizes of DeepSeek-R1; its variants are other score functions, and products in float32."""
    experts, ranks, weights = on_meta(T, K, dtype=I64), on_meta(T, K, dtype=I64), on_meta(T, K, dtype=F32)
    tokens, rows, logits = on_meta(T, H), on_meta(R, H), on_meta(T, E, dtype=F32)
    options = RouteOptions(K, "sigmoid", 8, 4, factor=2.5)
    decided = route.route(logits, on_meta(E, dtype=F32), options)
    assert [tuple(tensor.shape) for tensor in decided] == [(T, K)] * 3 + [(T // 64, E)] * 2 + [(T, K)]
    route.route_backward(weights, experts, weights, E, options)
    if variants:
        route.route(logits, None, RouteOptions(K, "softmax"))
        route.route_backward(
            weights, experts, weights, E, RouteOptions(K, "softmax", normalize=False), logits, logits[0]
        )
    first_row, _ = permute.scan(decided[3])
    assert permute.permute(tokens, experts, ranks, first_row)[0].shape == (R, H)
    assert combine.sum_rows(rows, experts).shape == combine.sum_rows(rows, experts, weights).shape == (T, H)
    assert combine.copy_rows(tokens, experts, R).shape == (R, H)
    combine.weighted_backward(tokens, rows, experts, weights)
    gate_up, ends = on_meta(R, 2 * F), on_meta(LOCAL, dtype=I32)
    gate, up = gate_up.chunk(2, dim=1)
    hidden, scale = swiglu.swiglu(gate, up, on_meta(R, dtype=F32)), on_meta(R, dtype=F32)
    swiglu.swiglu_backward(hidden, gate, up, gate, up, scale)
    gain = on_meta(H)
    _, scales = rms_norm.rms_norm(tokens, gain, 1e-6)
    rms_norm.rms_norm_backward(tokens, tokens, gain, scales)
    logits, targets, vector = on_meta(CHUNK, V, dtype=F32), on_meta(CHUNK, dtype=I64), on_meta(CHUNK, dtype=F32)
    assert policy_head.statistics(logits, targets, 1.0).shape == (CHUNK, 4)
    policy_head.gradient(logits, None, targets, *(vector for _ in range(4)), 1.0, on_meta(CHUNK, V))
    if variants:
        policy_head.gradient(logits, targets, targets, *(vector for _ in range(4)), 1.0, on_meta(CHUNK, V))
        policy_head.gradient(logits, None, targets, *(vector for _ in range(4)), 1.0, logits)
    for dtype in (BF16, F32)[: 1 + variants]:
        weight, down = on_meta(LOCAL, 2, F, H, dtype=dtype), on_meta(LOCAL, H, F, dtype=dtype)
        grouped.gate_up_swiglu(rows.to(dtype), weight, scale, ends)
        grouped.matmul(hidden.to(dtype), down.transpose(1, 2), ends)
        grouped.matmul(rows.to(dtype), down, ends)
        grouped.outer(rows.to(dtype), hidden.to(dtype), ends)


def record(capability: int) -> dict[str, tuple]:
    """The launches for a GPU of this capability (90 for 9.0), by the kernel's name and what tells them apart."""
    launches: dict[str, tuple] = {}

    def run(self, *args, grid, warmup, **options):
        assert all(0 < size <= limit for size, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=False))
        bound = dict(zip(self.arg_names, args, strict=True))
        launches.setdefault(_name(self, bound), (self, bound, options))

    original, JITFunction.run = JITFunction.run, run
    grouped.capability = lambda device: divmod(capability, 10)
    grouped.shared_memory = lambda device: SHARED_MEMORY[capability]
    try:
        launch_all(variants=capability == VARIANTS_OF)
    finally:
        JITFunction.run = original
    return launches


def _name(kernel: JITFunction, bound: dict) -> str:
    types = {str(value.dtype).removeprefix("torch.") for value in bound.values() if isinstance(value, torch.Tensor)}
    wide = "float32" if "bfloat16" not in types and "float32" in types else "bfloat16"
    flags = [name.lower() for name, value in bound.items() if value is True and name != "DESCRIPTORS"]
    given = [name for name in OPTIONAL.get(kernel.__name__, ()) if bound[name] is not None]
    layout = ["straight"] if bound.get("stride_column") == 1 else []
    return " ".join([kernel.__name__.strip("_"), wide, *flags, *given, *layout])


def source_of(kernel: JITFunction, bound: dict) -> ASTSource:
    """As Triton's own launcher specialises: on 1, on multiples of 16, on what is missing."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, bound.values(), strict=True)):
        if isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{mangle_type(value.base)[1:]}{list(value.block_shape)}>"
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(kernel: JITFunction, bound: dict, options: dict, capability: int) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory, and how the tensor cores are used."""
    compiled = triton.compile(source_of(kernel, bound), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", run.stdout + run.stderr)}
    assembly = compiled.asm["ptx"]
    instructions = {name: len(re.findall(name, assembly)) for name in (r"wgmma\.mma", r"tcgen05\.mma", r"mma\.sync")}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared,
            "threads": 32 * compiled.metadata.num_warps, "matrix_instructions": sum(instructions.values())}  # fmt: skip


def main() -> None:
    capabilities = [int(argument) for argument in sys.argv[1:]]
    launches = {capability: record(capability) for capability in capabilities}
    kernels = {
        capability: {name: resources(*launch, capability) for name, launch in of_one.items()}
        for capability, of_one in launches.items()
    }
    json.dump({"version": triton.__version__, "kernels": kernels}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
