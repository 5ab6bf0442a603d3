"""Where the time of a MoE layer goes, stage by stage, beside what it could be; on one CPU thread, or on a GPU.

    python benchmarks/moe_layer.py                                    # T=4096, H=512, E=32, K=4, F=512: a minute
    python benchmarks/moe_layer.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 7168 --width 2048 --top_k 8
    python benchmarks/moe_layer.py --output benchmarks/results/moe_layer.json

The first table has the stages of r1mega's layer, forward and backward: time, the bytes that its implementation reads
and writes, the fewest that any can, and which fraction of the bandwidth of a plain copy on this machine that is; for
products, their operations and the fraction of the rate of a large product. Beside it stand the times of PyTorch's
operations, of megatron-core's router, permutation and combination where it is installed, and on a GPU of Transformer
Engine's. A stage that works in the cache can exceed 1.

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
import importlib.metadata
import json
import statistics
import sys
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
from benchmarks.peers.routing_functions import Routed  # noqa: E402
from benchmarks.routing_stages import leaf, routing_stages  # noqa: E402
from benchmarks.stages import OURS, Lines, Rates, Stage, table  # noqa: E402
from benchmarks.timing import Work, about, machine_rates, seconds, spread  # noqa: E402
from r1mega.config import MoEConfig  # noqa: E402
from r1mega.files import write_whole  # noqa: E402
from r1mega.kernels import native  # noqa: E402
from r1mega.kernels.grouped_swiglu import grouped_swiglu  # noqa: E402
from r1mega.kernels.linear import grouped_linear, linear  # noqa: E402
from r1mega.kernels.products import group_matmul, group_outer  # noqa: E402
from r1mega.kernels.route import route  # noqa: E402
from r1mega.kernels.swiglu import weighted_swiglu  # noqa: E402
from r1mega.moe.layer import MoELayer  # noqa: E402
from r1mega.parallel_state import ParallelState  # noqa: E402

TARGET = 1.1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PEER_SECONDS = 600
# "gate_up_swiglu" is the two before it as the layer calls them, together: one kernel on a GPU
STAGES = ("gate", "route", "permute", "gate_up", "swiglu", "gate_up_swiglu", "down", "combine")
DIRECTIONS = ("forward", "backward")


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
        self.logits_TE = self.x_TH.detach().float() @ self.gate.detach().t()
        self.choices = route(self.logits_TE, None, self.layer.gate.options)
        # What the layer hands to its products: on a GPU the host does not read it.
        self.counts = self.choices.counts_E if self.device.type == "cuda" else self.choices.counts_E.tolist()


def stages(p: Problem) -> dict[tuple[str, str], Stage]:
    """Forward and backward of each stage of the layer; a backward runs again and again on one graph."""
    routed = Routed(p.x_TH, p.logits_TE, p.layer.gate.options, p.choices, p.grad_TH)
    both = product_stages(p) | routing_stages(routed)
    return {(name, direction): both[name, direction] for direction in DIRECTIONS for name in STAGES}


def product_stages(p: Problem) -> dict[tuple[str, str], Stage]:
    """Gate, the experts' two products and what is between them, beside the same of PyTorch's operations."""
    s, b, store = p.sizes, p.dtype.itemsize, AtOnce()
    draw = partial(torch.randn, dtype=p.dtype, device=p.device)
    x, rows, gate_up, hidden = leaf(p.x_TH), *(
        draw(s.rows, width).requires_grad_() for width in (s.hidden, 2 * s.width, s.width)
    )  # fmt: skip
    weights_R = torch.rand(s.rows, device=p.device).requires_grad_()
    # Leaves of their own: gradients of PyTorch are new tensors, those of r1mega are added to the parameters'.
    gate, ups, downs = leaf(p.gate), leaf(p.gate_up.flatten(1, 2)), leaf(p.down)

    def by_linear(rows_RX: Tensor, weights_EYX: Tensor) -> Tensor:
        if isinstance(p.counts, Tensor):
            return F.grouped_mm(rows_RX, weights_EYX.transpose(1, 2), offs=p.counts.cumsum(0, dtype=torch.int32))
        parts = zip(rows_RX.split(p.counts), weights_EYX.unbind(), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts])

    def swiglu(gate_up_R2F: Tensor, scale_R: Tensor) -> Tensor:
        gated, up = gate_up_R2F.chunk(2, dim=1)
        return F.silu(gated) * up * scale_R.unsqueeze(1).to(gate_up_R2F.dtype)

    forwards = {
        "gate": (lambda: linear(x.float(), p.gate, store), lambda: F.linear(x.float(), gate)),
        "gate_up": (lambda: grouped_linear(rows, p.gate_up, p.counts, store), lambda: by_linear(rows, ups)),
        "swiglu": (lambda: weighted_swiglu(gate_up, weights_R), lambda: swiglu(gate_up, weights_R)),
        "gate_up_swiglu": (
            lambda: grouped_swiglu(rows, p.gate_up, weights_R, p.counts, store),
            lambda: swiglu(by_linear(rows, ups), weights_R),
        ),
        "down": (lambda: grouped_linear(hidden, p.down, p.counts, store), lambda: by_linear(hidden, downs)),
    }
    inputs: dict[str, tuple[Tensor, ...]] = {"gate": (x,), "gate_up": (rows,), "swiglu": (gate_up, weights_R)}
    inputs |= {"gate_up_swiglu": (rows, weights_R), "down": (hidden,)}
    weights = {"gate": (gate,), "gate_up": (ups,), "swiglu": (), "gate_up_swiglu": (ups,), "down": (downs,)}
    tokens, wide, narrow, scales = s.tokens * s.hidden, s.rows * s.width, s.rows * s.hidden, 4 * s.rows
    of_gate, of_up, logits = 4 * p.gate.numel(), b * p.gate_up.numel(), 4 * s.tokens * s.experts
    of_x = b * tokens + (0 if b == 4 else 2 * 4 * tokens)  # in another type it is read, written as float32 and read
    flops = 2 * s.rows * s.hidden * s.width
    # Weights are read once; gradients of products twice, and those of the weights are read and written.
    moved = {
        "gate": (of_x + of_gate + logits, 2 * logits + 3 * of_gate + of_x + 4 * tokens),
        "gate_up": (b * (narrow + 2 * wide) + of_up, b * (4 * wide + 2 * narrow) + 3 * of_up),
        "swiglu": (3 * b * wide + scales, 5 * b * wide + 2 * scales),
        "gate_up_swiglu": (b * (narrow + 3 * wide) + of_up + scales, b * (7 * wide + 2 * narrow) + 3 * of_up),
        "down": (b * (wide + narrow) + of_up // 2, b * (2 * narrow + 2 * wide) + 3 * of_up // 2),
    }
    products = {"gate": 2 * s.tokens * s.hidden * s.experts, "gate_up": 2 * flops, "swiglu": 0, "down": flops}
    products["gate_up_swiglu"] = products["gate_up"]
    found = {}
    for name, (ours, theirs) in forwards.items():
        floors = (0, 0) if products[name] else moved[name]
        for i, direction in enumerate(DIRECTIONS):
            works = {OURS: ours, "PyTorch": theirs}
            if direction == "backward":
                works = {OURS: _back(ours(), inputs[name]), "PyTorch": _back(theirs(), inputs[name] + weights[name])}
            found[name, direction] = Stage(works, moved[name][i], floors[i], (1 + i) * products[name])
    return found


def _back(output: Tensor, leaves: tuple[Tensor, ...]) -> Work:
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def r1mega_layer(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and gradient of the tokens."""
    x = leaf(p.x_TH)
    output = p.layer(x, p.sizes.tokens, 1)[0]
    output.backward(p.grad_TH)
    return output.detach(), x.grad


def torch_layer(p: Problem, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same of PyTorch's operations; weight gradients are accumulated, too."""
    gate, gate_up, down = weights
    x = leaf(p.x_TH)
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


def layer_times(p: Problem, arguments: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """Times of the whole layers, and by how much r1mega's results differ from PyTorch's."""
    weights = [leaf(p.gate.detach()), leaf(p.gate_up.detach().flatten(1, 2)), leaf(p.down.detach())]
    forward, backward = products_alone(p)

    def alone() -> None:
        forward()
        backward()

    works = {"r1mega": partial(r1mega_layer, p), "products alone": alone}
    works["PyTorch's operations"] = partial(torch_layer, p, weights)
    worst = difference(r1mega_layer(p), torch_layer(p, weights))
    return seconds(works, arguments.rounds, 1, p.device), worst


def print_layers(times: dict[str, list[float]]) -> None:
    floor = statistics.median(times["products alone"])
    print(f"{'layer, forward and backward':32}{'ms':>9}{'range':>18}{'of products':>13}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:32}{median * 1e3:9.1f}{spread(values):>18}{median / floor:13.3f}")


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
    lines = []
    if arguments.only != "layers":
        lines = Lines(stages(p), Rates(copy, product)).measure(arguments.rounds, arguments.calls, device)
    times, worst = layer_times(p, arguments)
    if device.type == "cpu" and dtype == torch.float32 and not arguments.no_megatron:
        peer = megatron(sizes, arguments.rounds)
        if peer:
            times["megatron-core"] = [sum(pair) for pair in zip(peer["forward"], peer["backward"], strict=True)]
    print(f"T={sizes.tokens} H={sizes.hidden} E={sizes.experts} K={sizes.top_k} F={sizes.width}, {arguments.dtype}")
    print(f"{device.type}; {native.reason}")
    print(f"copy {copy / 1e9:.1f} GB/s, product {product / 1e9:.0f} GFLOP/s; results differ by {worst:.1e}\n")
    print(table(lines) + "\n\n" if lines else "", end="")
    print_layers(times)
    floor = statistics.median(times["products alone"])
    ratio = statistics.median(times["r1mega"]) / floor
    rate = 18 * sizes.rows * sizes.hidden * sizes.width / statistics.median(times["r1mega"]) / product
    print(f"\nr1mega takes {ratio:.3f} times the products alone (aim: {TARGET}), {rate:.0%} of the product's rate")
    if arguments.output:
        result = {"sizes": asdict(sizes), "dtype": arguments.dtype, "copy_bytes_per_second": copy}
        result |= {"product_flops_per_second": product, "stages": lines, "layers": times, "layer_over_products": ratio}
        text = json.dumps({**about(device), **result, "largest_difference": worst}, indent=1)
        write_whole(arguments.output, text + "\n")
        print(f"written to {arguments.output}")
    return 1 if worst > TOLERANCE[dtype] else 0


if __name__ == "__main__":
    sys.exit(main())
