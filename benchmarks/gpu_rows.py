"""Times the MoE operations on a GPU, each beside its target and PyTorch's operations, and counts waits for the GPU.

    python -m benchmarks.gpu_rows routing        # route, permute, combine, forward and backward, with 256 experts
    python -m benchmarks.gpu_rows layer          # every stage of a layer with 32 experts of this rank, and all of it
    python -m benchmarks.gpu_rows waits          # where a layer's forward and backward waits for the GPU

``tools/gpu_check.py`` runs all three. It needs torch and an NVIDIA GPU and nothing else.

A row is what a user calls, autograd included, unless its name says that it is a kernel alone. In ``routing`` a call
runs many times in one CUDA graph, so that no gap between launches counts; the logits of ``route`` take turns and are
together several times the cache (in ``route in cache`` they are not). ``eager us`` is the same with launches from
Python. It is the only time where a graph cannot be made, and in ``layer``, whose stages are longer than their launches.

The fraction is: the fewest bytes that the row can move over the bytes that a plain copy moves in that time, or its
multiply-adds over those of a large product. A row whose tensors fit into the cache can exceed 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import moe_layer  # noqa: E402
from benchmarks.gpu_timing import BF16, DEVICE, ROUNDS, Rates, Row, head, line_of, measure  # noqa: E402
from benchmarks.moe_layer import Sizes  # noqa: E402
from benchmarks.stages import OURS  # noqa: E402
from benchmarks.timing import Work  # noqa: E402
from r1mega.kernels import cuda  # noqa: E402
from r1mega.kernels.combine import combine  # noqa: E402
from r1mega.kernels.permute import permute  # noqa: E402
from r1mega.kernels.route import RouteOptions, reference_route, route  # noqa: E402
from tools.plain_tests import RESULT  # noqa: E402

CACHE_TIMES = 4  # logits together are at least this many times the second-level cache
ROUTE_MICROSECONDS, OF_COPY, OF_PRODUCT = 6.0, 0.85, 0.65  # the targets
Report = Callable[[dict], None]
WAIT = "synchronizing CUDA operation"
LAYERS: dict[str, dict] = {
    "plain": {},
    "balance and z loss": {"aux_loss_coefficient": 0.01, "z_loss_coefficient": 0.001},
    "drops over capacity": {"capacity_factor": 1.0},
    "padded to capacity": {"capacity_factor": 1.0, "pad_to_capacity": True},
    "recomputed": {"recompute": True},
    "shared expert": {"num_shared_experts": 1},
}


def sets(cache_bytes: int, set_bytes: int) -> int:
    """How many inputs of ``set_bytes`` it takes to be :data:`CACHE_TIMES` times the cache."""
    return max(1, -(-CACHE_TIMES * cache_bytes // max(set_bytes, 1)))


def cache_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size


class Routing:
    """Random logits and tokens, and what the operations make of them.

    Args:
        tokens: T.
        hidden: H.
        experts: E.
        top_k: K.
        groups: G.
        kept_groups: groups that a token's experts may come from.
    """

    def __init__(self, tokens: int, hidden: int, experts: int, top_k: int, groups: int, kept_groups: int) -> None:
        self.tokens, self.num_experts, self.top_k = tokens, experts, top_k
        self.row_bytes = hidden * BF16.itemsize
        self.options = RouteOptions(top_k, "sigmoid", groups, min(kept_groups, groups), True, 2.5)
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=DEVICE)
        self.bias = draw(experts) * 0.1
        number = sets(cache_bytes(), tokens * experts * 4)
        self.logits = [draw(tokens, experts).requires_grad_() for _ in range(number)]
        self.x, self.grad_TH = draw(tokens, hidden).to(BF16).requires_grad_(), draw(tokens, hidden).to(BF16)
        self.grad_TK, self.grad_R = draw(tokens, top_k), draw(tokens * top_k)
        self.choices = route(self.logits[0], self.bias, self.options)
        self.weights_TK = self.choices.weights_TK.detach().requires_grad_()

    def permute(self) -> tuple:
        c = self.choices
        decided = c.experts_TK, c.ranks_TK, c.counts_E
        return permute(self.x, self.weights_TK, *decided, first_row_NE=c.first_row_NE)


def gradient(outputs: object, inputs: object, grads: object) -> Work:
    """The backward of one graph, again and again."""
    return partial(torch.autograd.grad, outputs, inputs, grads, retain_graph=True)


def route_rows(p: Routing) -> list[Row]:
    """``route`` and its kernels."""
    num_bytes = 4 * p.tokens * p.num_experts + 8 * p.tokens * p.top_k
    ours = [partial(route, x, p.bias, p.options) for x in p.logits]
    peers = [partial(reference_route, x, p.bias, p.options) for x in p.logits]
    both = [[gradient(work().weights_TK, x, p.grad_TK) for work, x in zip(works, p.logits, strict=True)]
            for works in (ours, peers)]  # fmt: skip
    rows = [
        Row("route", ours, num_bytes, at_most=ROUTE_MICROSECONDS, peer=peers),
        Row("route in cache", ours[:1], num_bytes, at_most=ROUTE_MICROSECONDS, peer=peers[:1]),
        Row("route backward", both[0], num_bytes, peer=both[1]),
    ]
    if cuda.takes_route(p.logits[0], p.bias, p.options):
        of_tiles = [cuda.route(x.detach(), p.bias, p.options) for x in p.logits]
        tiles = [partial(cuda.scan, tile[3], tile[4]) for tile in of_tiles]
        kernels = [partial(cuda.route, x.detach(), p.bias, p.options) for x in p.logits]
        num_tiles = of_tiles[0][3].shape[0]
        rows.append(Row("route, kernel of choices", kernels, num_bytes))
        rows.append(Row("route, kernel of first rows", tiles, (12 * num_tiles + 8) * p.num_experts))
    return rows


def copy_rows(p: Routing) -> list[Row]:
    """``permute`` and ``combine``; PyTorch is told which token each row is of, which it would have to sort for."""
    choices = p.tokens * p.top_k
    num_bytes = (p.tokens + choices) * p.row_bytes
    rows, row_weights, row_map = p.permute()
    leaf, weights = rows.detach().requires_grad_(), p.weights_TK
    token_of_row = p.choices.experts_TK.flatten().argsort(stable=True) // p.top_k
    grad_rows = torch.randn_like(leaf)
    gathered = p.x.index_select(0, token_of_row)
    weight_of_row = row_weights.detach().to(BF16).unsqueeze(1).requires_grad_()
    summed: Work = lambda: torch.zeros_like(p.x).index_add(0, token_of_row, leaf)  # noqa: E731
    weighted: Work = lambda: torch.zeros_like(p.x).index_add(0, token_of_row, leaf * weight_of_row)  # noqa: E731
    back = partial(gradient, grads=p.grad_TH)
    target = {"at_least": OF_COPY}
    return [
        Row("permute", [p.permute], num_bytes + 4 * choices, **target,
            peer=[lambda: p.x.index_select(0, token_of_row)]),
        Row("permute backward", [gradient((rows, row_weights), (p.x, weights), (grad_rows, p.grad_R))], num_bytes,
            **target, peer=[gradient(gathered, p.x, grad_rows)]),
        Row("combine", [partial(combine, leaf, row_map)], num_bytes + 8 * choices, **target, peer=[summed]),
        Row("combine backward", [back(combine(leaf, row_map), leaf)], num_bytes, **target,
            peer=[back(summed(), leaf)]),
        Row("weighted combine", [partial(combine, leaf, row_map, weights)], num_bytes + 8 * choices, **target,
            peer=[weighted]),
        Row("weighted combine backward", [back(combine(leaf, row_map, weights), (leaf, weights))],
            num_bytes + choices * p.row_bytes, **target, peer=[back(weighted(), (leaf, weight_of_row))]),
    ]  # fmt: skip


def layer_rows(p: moe_layer.Problem) -> list[Row]:
    """Every stage of a layer, forward and backward."""
    targets = {"permute": OF_COPY, "combine": OF_COPY}
    rows = []
    for (name, direction), stage in moe_layer.stages(p).items():
        full_name = name if direction == "forward" else f"{name} backward"
        row = Row(full_name, [stage.works[OURS]], stage.floor_bytes, stage.flops, at_least=targets.get(name))
        row.peer = [stage.works["PyTorch"]] if "PyTorch" in stage.works else []
        rows.append(row)
    return rows


def whole_layer(p: moe_layer.Problem, rates: Rates) -> tuple[dict, float]:
    """A row of the layer, forward and backward, and by how much its results differ from PyTorch's."""
    times, difference = moe_layer.layer_times(p, argparse.Namespace(rounds=ROUNDS))
    flops = 18 * p.sizes.rows * p.sizes.hidden * p.sizes.width
    fraction = flops / statistics.median(times["r1mega"]) / rates.product
    return {
        "row": "layer, both ways", "seconds": times["r1mega"], "eager_seconds": times["r1mega"], "floor_bytes": 0,
        "flops": flops, "fraction": fraction, "of": "product", "at_most_us": None, "at_least": OF_PRODUCT,
        "met": fraction >= OF_PRODUCT, "pytorch_seconds": times["PyTorch's operations"],
        "products_alone_seconds": times["products alone"],
    }, difference  # fmt: skip


def waits_of(work: Work) -> list[str]:
    """Where ``work`` waits for the GPU: the line of r1mega that is nearest, once for each time."""
    found: list[str] = []

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if WAIT in str(message):
            ours = [f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}" for frame in traceback.extract_stack()
                    if frame.filename.startswith(str(ROOT / "r1mega"))]  # fmt: skip
            found.append(ours[-1] if ours else f"{filename}:{lineno}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def step_of(options: dict) -> Work:
    """Forward and backward of a small layer."""
    p = moe_layer.Problem(Sizes(1024, 512, 32, 4, 256), DEVICE, BF16, options)

    def step() -> None:
        output, losses = p.layer(p.x_TH, p.sizes.tokens, 1)
        torch.autograd.backward([output, *losses.values()], [p.grad_TH, *map(torch.ones_like, losses.values())])

    return step


def attempt(name: str, work: Work, report: Report) -> bool:
    """Do ``work``; an error is reported, and does not keep what comes after from running. Whether there was none."""
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        report({"name": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
        return False
    return True


def run_waits(arguments: argparse.Namespace, report: Report) -> bool:
    def count(name: str, options: dict) -> None:
        step = step_of(options)
        step()  # compiles what is compiled at first use
        found = waits_of(step)
        print(f"{name:28}{len(found):4} waits  {', '.join(found)}", flush=True)
        report({"layer": name, "waits": found})

    return all([attempt(name, partial(count, name, options), report) for name, options in LAYERS.items()])


def run_rows(rows: list[Row], rates: Rates, with_graph: bool, report: Report) -> bool:
    def run(row: Row) -> None:
        result = measure(row, rates, with_graph)
        print(line_of(result), flush=True)
        report(result)

    return all([attempt(row.name, partial(run, row), report) for row in rows])


def begin(report: Report) -> Rates:
    rates = Rates.measure()
    print(f"copy {rates.copy / 1e12:.2f} TB/s, product {rates.product / 1e12:.0f} TFLOP/s\n{head()}", flush=True)
    report({"copy_bytes_per_second": rates.copy, "product_flops_per_second": rates.product})
    return rates


def run_routing(sizes: argparse.Namespace, report: Report) -> bool:
    p = Routing(sizes.tokens, sizes.hidden, sizes.experts, sizes.top_k, sizes.groups, sizes.kept_groups)
    rates = begin(report)
    return all([run_rows(make(p), rates, True, report) for make in (route_rows, copy_rows)])


def run_layer(sizes: argparse.Namespace, report: Report) -> bool:
    of_layer = Sizes(sizes.tokens, sizes.hidden, sizes.local_experts, sizes.top_k, sizes.width)
    p = moe_layer.Problem(of_layer, DEVICE, BF16)
    rates = begin(report)

    def run() -> None:
        result, difference = whole_layer(p, rates)
        print(line_of(result), flush=True)
        report(result | {"difference": difference})
        if difference > moe_layer.TOLERANCE[BF16]:
            raise ValueError(f"its results differ from PyTorch's by {difference:.1e}")

    passed = attempt("layer, both ways", run, report)  # first, as it matters most
    return run_rows(layer_rows(p), rates, False, report) and passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = {"routing": run_routing, "layer": run_layer, "waits": run_waits}
    parser.add_argument("part", choices=runs)
    size_arguments(parser)
    parser.add_argument("--results", action="store_true", help="each result as a line of JSON, too")
    arguments = parser.parse_args()

    def report(result: dict) -> None:
        if arguments.results:
            print(RESULT + json.dumps(result), flush=True)

    def run() -> None:
        nonlocal passed
        # Backwards run on the stream of their forward, which must be the one that a graph is made of.
        with torch.cuda.stream(torch.cuda.Stream()):
            passed = runs[arguments.part](arguments, report)

    passed = False
    attempt(arguments.part, run, report)
    return 0 if passed else 1


def size_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of DeepSeek-V3, by default."""
    sizes = {"tokens": 8192, "hidden": 7168, "experts": 256, "top_k": 8, "groups": 8, "kept_groups": 4,
             "local_experts": 32, "width": 2048}  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")


if __name__ == "__main__":
    sys.exit(main())
