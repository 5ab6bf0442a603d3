"""Where the time of a MoE layer goes, stage by stage, beside what it could be; on one CPU thread, or on a GPU.

    python benchmarks/moe_layer.py                                    # T=4096, H=512, E=32, K=4, F=512: a minute
    python benchmarks/moe_layer.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 7168 --width 2048 --top_k 8
    python benchmarks/moe_layer.py --output benchmarks/results/moe_layer.json

The first table has the stages of r1mega's layer, forward and backward: time, and which fraction of the bandwidth of a
plain copy on this machine the fewest bytes that the stage can move are; or, for products, which fraction of the rate of
a large product. A stage that works in the cache can exceed 1.

The second has the whole layer, forward and backward with the gradients of weights accumulated, beside its experts'
matrix products alone (the same rows for each expert, nothing between them; the aim is 1.1 times as long at most), a
layer of PyTorch's operations (argsort, index_select, linear, index_add), and, on a CPU, megatron-core's layer where it
is installed.

Times are CPU time of the process, on a GPU the time between events of its stream; the median of rounds in which all
take turns (megatron-core's, which changes PyTorch for its whole process, runs in one of its own). Exit status: 1 where
the results of the layers differ.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.launch import RunFailed, run_program  # noqa: E402
from r1mega.config import MoEConfig  # noqa: E402
from r1mega.files import write_whole  # noqa: E402
from r1mega.kernels import native  # noqa: E402
from r1mega.kernels.combine import combine  # noqa: E402
from r1mega.kernels.grouped_swiglu import grouped_swiglu  # noqa: E402
from r1mega.kernels.linear import grouped_linear, linear  # noqa: E402
from r1mega.kernels.permute import permute  # noqa: E402
from r1mega.kernels.products import group_matmul, group_outer, matmul  # noqa: E402
from r1mega.kernels.route import route  # noqa: E402
from r1mega.kernels.swiglu import weighted_swiglu  # noqa: E402
from r1mega.moe.layer import MoELayer  # noqa: E402
from r1mega.parallel_state import ParallelState  # noqa: E402

TARGET = 1.1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PEER_SECONDS = 600
Work = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """T, H, E, K and F of a layer."""

    tokens: int
    hidden: int
    experts: int
    top_k: int
    width: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k


@dataclass(frozen=True)
class Stage:
    """A stage's work, the fewest bytes that it can move, and its multiply-adds times two."""

    work: Work
    num_bytes: int = 0
    flops: int = 0


class AtOnce:
    """A store of weight gradients that runs all work at once, as the executor does outside of split backwards."""

    def add(self, work: Callable[[], None]) -> None:
        work()


@dataclass
class Problem:
    """A layer with random weights and tokens, and the gradient of its output."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    options: dict = field(default_factory=dict)  # more of MoEConfig
    layer: MoELayer = field(init=False)

    def __post_init__(self) -> None:
        s, generator = self.sizes, torch.Generator(self.device).manual_seed(0)
        config = MoEConfig(s.experts, s.top_k, s.width, score_function="softmax", score_bias=False, **self.options)
        self.state = ParallelState.single_process(self.device)
        self.layer = MoELayer(s.hidden, config, self.state, self.dtype, self.device.type)
        for module in self.layer.modules():
            if hasattr(module, "weight_gradients"):
                module.weight_gradients = AtOnce()

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)

        with torch.no_grad():
            for parameter in self.layer.parameters():
                whole = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                whole.copy_(draw(*whole.shape) / s.hidden**0.5)
        self.x_TH, self.grad_TH = draw(s.tokens, s.hidden).requires_grad_(), draw(s.tokens, s.hidden)
        self.gate = self.layer.gate.weight.detach().float().requires_grad_()
        self.gate_up, self.down = (
            weight.to_local().detach().requires_grad_()
            for weight in (self.layer.experts.gate_up_proj, self.layer.experts.down_proj)
        )
        self.choices = route(self.x_TH.detach().float() @ self.gate.detach().t(), None, self.layer.gate.options)
        # What the layer hands to its products: on a GPU the host does not read it.
        self.counts = self.choices.counts_E if self.device.type == "cuda" else self.choices.counts_E.tolist()


def stages(p: Problem) -> dict[str, tuple[Stage, Stage]]:
    """Forward and backward of each stage of r1mega's layer; the backward runs again and again on one graph.

    ``gate_up_swiglu`` is ``gate_up`` and ``swiglu`` as the layer calls them, together: one kernel on a GPU.
    """
    s, b, store = p.sizes, p.dtype.itemsize, AtOnce()
    leaf = partial(_leaf)
    x, chosen = leaf(p.x_TH), p.choices
    decided = chosen.experts_TK, chosen.ranks_TK, chosen.counts_E
    weights_TK = leaf(chosen.weights_TK)
    gate_forward = lambda: linear(x.float(), p.gate, store)  # noqa: E731
    logits = gate_forward()
    logits_leaf = leaf(logits)
    route_forward = lambda: route(logits_leaf, None, p.layer.gate.options)  # noqa: E731
    routed = route_forward()
    permute_forward = lambda: permute(x, weights_TK, *decided, first_row_NE=chosen.first_row_NE)  # noqa: E731
    rows, row_weights, row_map = permute_forward()
    rows_leaf, weights_leaf = leaf(rows), leaf(row_weights)
    gate_up_forward = lambda: grouped_linear(rows_leaf, p.gate_up, p.counts, store)  # noqa: E731
    gate_up = gate_up_forward()
    gate_up_leaf = leaf(gate_up)
    swiglu_forward = lambda: weighted_swiglu(gate_up_leaf, weights_leaf)  # noqa: E731
    hidden = swiglu_forward()
    hidden_leaf = leaf(hidden)
    fused_forward = lambda: grouped_swiglu(rows_leaf, p.gate_up, weights_leaf, p.counts, store)  # noqa: E731
    down_forward = lambda: grouped_linear(hidden_leaf, p.down, p.counts, store)  # noqa: E731
    down = down_forward()
    down_leaf = leaf(down)
    combine_forward = lambda: combine(down_leaf, row_map)  # noqa: E731
    combined = combine_forward()
    token_rows, routed_rows = s.tokens * s.hidden * b, s.rows * s.hidden * b
    choices, logit_bytes, expert_flops = s.rows * 4, 4 * s.tokens * s.experts, 2 * s.rows * s.hidden * s.width
    wide = s.rows * s.width * b
    gate_flops = 2 * s.tokens * s.hidden * s.experts

    def back(outputs: object, leaves: object) -> Work:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = tuple(torch.randn_like(output) for output in outputs)
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    return {
        "gate": (Stage(gate_forward, flops=gate_flops), Stage(back(logits, x), flops=2 * gate_flops)),
        "route": (
            Stage(route_forward, logit_bytes + 2 * choices),
            Stage(back(routed.weights_TK, logits_leaf), logit_bytes + 2 * choices),
        ),
        "permute": (
            Stage(permute_forward, token_rows + routed_rows + choices),
            Stage(back((rows, row_weights), (x, weights_TK)), token_rows + routed_rows),
        ),
        "gate_up": (
            Stage(gate_up_forward, flops=2 * expert_flops), Stage(back(gate_up, rows_leaf), flops=4 * expert_flops)
        ),
        "swiglu": (
            Stage(swiglu_forward, 3 * wide + choices),
            Stage(back(hidden, (gate_up_leaf, weights_leaf)), 5 * wide + 2 * choices),
        ),
        "gate_up_swiglu": (
            Stage(fused_forward, flops=2 * expert_flops),
            Stage(back(fused_forward(), (rows_leaf, weights_leaf)), flops=4 * expert_flops),
        ),
        "down": (Stage(down_forward, flops=expert_flops), Stage(back(down, hidden_leaf), flops=2 * expert_flops)),
        "combine": (
            Stage(combine_forward, token_rows + routed_rows + 2 * choices),
            Stage(back(combined, down_leaf), token_rows + routed_rows),
        ),
    }  # fmt: skip


def torch_stages(p: Problem) -> dict[str, tuple[Work, Work]]:
    """Forward and backward of the experts' stages in PyTorch's operations; weight gradients are not accumulated."""
    s, make = p.sizes, partial(torch.randn, dtype=p.dtype, device=p.device)
    x, both, hidden = (make(s.rows, width).requires_grad_() for width in (s.hidden, 2 * s.width, s.width))
    scale = make(s.rows, 1).requires_grad_()
    ends = torch.as_tensor(p.counts, device=p.device).cumsum(0, dtype=torch.int32)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight.flatten(1, -2).transpose(1, 2), offs=ends)

    def swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=1)
        return F.silu(gate) * up * scale

    forwards: dict[str, tuple[Work, tuple[Tensor, ...]]] = {
        "gate_up": (lambda: product(x, p.gate_up), (x, p.gate_up)),
        "swiglu": (lambda: swiglu(both), (both, scale)),
        "gate_up_swiglu": (lambda: swiglu(product(x, p.gate_up)), (x, p.gate_up, scale)),
        "down": (lambda: product(hidden, p.down), (hidden, p.down)),
    }
    found = {}
    for name, (forward, leaves) in forwards.items():
        output = forward()
        given = output, leaves, torch.randn_like(output)
        found[name] = forward, partial(torch.autograd.grad, *given, retain_graph=True)
    return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def r1mega_layer(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and gradient of the tokens."""
    x = _leaf(p.x_TH)
    output = p.layer(x, p.sizes.tokens, 1)[0]
    output.backward(p.grad_TH)
    return output.detach(), x.grad


def torch_layer(p: Problem, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same of PyTorch's operations; weight gradients are accumulated, too."""
    gate, gate_up, down = weights
    x = _leaf(p.x_TH)
    probabilities = F.linear(x.float(), gate).softmax(-1)
    top, experts = probabilities.topk(p.sizes.top_k)
    top = top / top.sum(-1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    tokens = order // p.sizes.top_k
    counts = torch.bincount(experts.flatten(), minlength=p.sizes.experts).tolist()
    rows = x.index_select(0, tokens).split(counts)
    outputs = []
    for part, up_e, down_e in zip(rows, gate_up, down, strict=True):
        gated, up = F.linear(part, up_e).chunk(2, dim=1)
        outputs.append(F.linear(F.silu(gated) * up, down_e))
    weighted = torch.cat(outputs) * top.flatten()[order].unsqueeze(1).to(x.dtype)
    output = torch.zeros_like(x).index_add(0, tokens, weighted)
    output.backward(p.grad_TH)
    return output.detach(), x.grad


def products_alone(p: Problem) -> tuple[Work, Work]:
    """Forward and backward of the experts' products: one an expert on a CPU, one a group on a GPU."""
    s = p.sizes
    ups, downs = p.gate_up.detach().flatten(1, 2), p.down.detach()
    make = partial(torch.randn, dtype=p.dtype, device=p.device)
    x, wide, narrow, out = (make(s.rows, width) for width in (s.hidden, 2 * s.width, s.width, s.hidden))
    if p.device.type == "cuda":
        offsets = torch.as_tensor(p.counts, device=p.device).cumsum(0).to(torch.int32)
        product = partial(F.grouped_mm, offs=offsets)
        up_t, down_t = ups.transpose(1, 2), downs.transpose(1, 2)

        def forward() -> None:
            product(x, up_t)
            product(narrow, down_t)

        def backward() -> None:
            product(out, downs)
            product(out.t(), narrow)
            product(wide, ups)
            product(wide.t(), x)

        return forward, backward
    grad_ups, grad_downs = torch.zeros_like(ups), torch.zeros_like(downs)

    def forward() -> None:
        group_matmul(x, ups.transpose(1, 2), p.counts)
        group_matmul(narrow, downs.transpose(1, 2), p.counts)

    def backward() -> None:
        group_matmul(out, downs, p.counts)
        group_outer(out, narrow, p.counts, grad_downs, add=True)
        group_matmul(wide, ups, p.counts)
        group_outer(wide, x, p.counts, grad_ups, add=True)

    return forward, backward


def seconds(works: dict[str, Work], rounds: int, calls: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of one call in each round; all take turns, the first round does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            took = _gpu_seconds(work, calls) if device.type == "cuda" else _cpu_seconds(work, calls)
            if index:
                found[name].append(took)
    return found


def _cpu_seconds(work: Work, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls


def _gpu_seconds(work: Work, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy far larger than the cache, operations a second of a large product."""
    size, edge = (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1536)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    works: dict[str, Work] = {"copy": lambda: target.copy_(source), "product": lambda: matmul(a, b)}
    times = seconds(works, 5, 2, device)
    return 2 * size / statistics.median(times["copy"]), 2 * edge**3 / statistics.median(times["product"])


def difference(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """The largest, relative to the largest value."""
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in zip(a, b, strict=True))


def megatron(sizes: Sizes, rounds: int) -> dict[str, list[float]] | None:
    """Times of megatron-core's layer on the CPU; None where it cannot be had."""
    arguments = [f"--{name}={value}" for name, value in asdict(sizes).items()]
    try:
        importlib.metadata.version("megatron-core")
        return run_program("benchmarks.peers.megatron_moe_layer", 1, [*arguments, f"--rounds={rounds}"], PEER_SECONDS)
    except (importlib.metadata.PackageNotFoundError, RunFailed) as error:
        print(f"without megatron-core: {error}", file=sys.stderr)
        return None


def size_arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"tokens": 4096, "hidden": 512, "experts": 32, "top_k": 4, "width": 512, "rounds": 7}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    return parser


def about(device: torch.device) -> dict:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name,
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "kernels": native.reason,
    }


def stage_lines(p: Problem, arguments: argparse.Namespace, copy: float, product: float) -> list[dict]:
    """One entry for each stage and direction."""
    lines = []
    found = stages(p)
    for direction, index in (("forward", 0), ("backward", 1)):
        works = {name: both[index].work for name, both in found.items()}
        times = seconds(works, arguments.rounds, arguments.calls, p.device)
        for name, both in found.items():
            stage, median = both[index], statistics.median(times[name])
            fraction = stage.num_bytes / median / copy if stage.num_bytes else stage.flops / median / product
            line = {"stage": name, "direction": direction, "seconds": times[name], "floor_bytes": stage.num_bytes}
            lines.append(line | {"flops": stage.flops, "fraction": fraction})
    return lines


def layer_times(p: Problem, arguments: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Times of the whole layers, and by how much r1mega's results differ from PyTorch's."""
    weights = [_leaf(p.gate.detach()), _leaf(p.gate_up.detach().flatten(1, 2)), _leaf(p.down.detach())]
    forward, backward = products_alone(p)

    def alone() -> None:
        forward()
        backward()

    works = {"r1mega": partial(r1mega_layer, p), "products alone": alone}
    works["PyTorch's operations"] = partial(torch_layer, p, weights)
    worst = difference(r1mega_layer(p), torch_layer(p, weights))
    return seconds(works, arguments.rounds, 1, p.device), worst


def print_tables(p: Problem, lines: list[dict], times: dict[str, list[float]]) -> None:
    print(f"{'stage':16}{'forward ms':>12}{'fraction':>10}{'backward ms':>14}{'fraction':>10}  of")
    half = len(lines) // 2
    for forward, backward in zip(lines[:half], lines[half:], strict=True):
        of = "copy" if forward["floor_bytes"] else "product"
        both = [(statistics.median(line["seconds"]) * 1e3, line["fraction"]) for line in (forward, backward)]
        print(f"{forward['stage']:16}{both[0][0]:12.2f}{both[0][1]:10.2f}{both[1][0]:14.2f}{both[1][1]:10.2f}  {of}")
    floor = statistics.median(times["products alone"])
    print(f"\n{'layer, forward and backward':32}{'ms':>9}{'range':>20}{'of products':>13}")
    for name, values in times.items():
        spread = f"{min(values) * 1e3:8.1f} -{max(values) * 1e3:8.1f}"
        print(f"{name:32}{statistics.median(values) * 1e3:9.1f}{spread:>20}{statistics.median(values) / floor:13.3f}")


def main() -> int:
    parser = size_arguments(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="default %(default)s")
    parser.add_argument("--calls", type=int, default=1, help="calls of a stage timed together, default %(default)s")
    parser.add_argument("--only", choices=("stages", "layers"), help="one of the tables alone")
    parser.add_argument("--no_megatron", action="store_true", help="leave megatron-core out")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all as JSON, too")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: this PyTorch sees no GPU")
    torch.set_num_threads(1)
    sizes = Sizes(arguments.tokens, arguments.hidden, arguments.experts, arguments.top_k, arguments.width)
    p = Problem(sizes, device, dtype)
    copy, product = machine_rates(device, dtype)
    lines = [] if arguments.only == "layers" else stage_lines(p, arguments, copy, product)
    times, worst = layer_times(p, arguments)
    if device.type == "cpu" and dtype == torch.float32 and not arguments.no_megatron:
        peer = megatron(sizes, arguments.rounds)
        if peer:
            times["megatron-core"] = [sum(pair) for pair in zip(peer["forward"], peer["backward"], strict=True)]
    print(f"T={sizes.tokens} H={sizes.hidden} E={sizes.experts} K={sizes.top_k} F={sizes.width}, {arguments.dtype}")
    print(f"{device.type}; {native.reason}")
    print(f"copy {copy / 1e9:.1f} GB/s, product {product / 1e9:.0f} GFLOP/s; results differ by {worst:.1e}\n")
    print_tables(p, lines, times)
    floor = statistics.median(times["products alone"])
    ratio = statistics.median(times["r1mega"]) / floor
    rate = 18 * sizes.rows * sizes.hidden * sizes.width / statistics.median(times["r1mega"]) / product
    print(f"\nr1mega takes {ratio:.3f} times the products alone (aim: {TARGET}), {rate:.0%} of the product's rate")
    if arguments.output:
        result = {"sizes": asdict(sizes), "dtype": arguments.dtype, "copy_bytes_per_second": copy}
        result |= {"product_flops_per_second": product, "stages": lines, "layers": times, "layer_over_products": ratio}
        import json

        text = json.dumps({**about(device), **result, "largest_difference": worst}, indent=1)
        write_whole(arguments.output, text + "\n")
        print(f"written to {arguments.output}")
    return 1 if worst > TOLERANCE[dtype] else 0


if __name__ == "__main__":
    sys.exit(main())
