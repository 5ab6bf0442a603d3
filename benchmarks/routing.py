"""Dispatch and combine of one MoE layer, on one CPU thread or on a GPU: r1mega beside its peers.

    python benchmarks/routing.py                                             # T=4096, H=512, E=32, K=4: a minute
    python benchmarks/routing.py --tokens 8192 --hidden 2048 --experts 256 --top_k 8
    python benchmarks/routing.py --device cuda --dtype bfloat16 --tokens 8192 --hidden 7168 --experts 256 --top_k 8
    python benchmarks/routing.py --output benchmarks/results/routing.json

Peers are PyTorch's operations, megatron-core's functions where it is installed, and Transformer Engine's on a GPU where
it is (benchmarks/peers/routing_functions.py). The first table compares whole paths, forward and backward: the tokens'
rows and weights to expert order, then the sum of each token's rows, with gradients of tokens and weights. The experts
between them are left out. Each path starts from what its own router hands over: r1mega and PyTorch's operations from
the experts of each token (r1mega's ranks are counted in, although ``route`` makes them on the way), the others from a
dense map and dense probabilities, whose making is not counted. Results are compared before they are timed, those of the
routers, too. A large part of r1mega's lead on a CPU at the default sizes is that its large results use their memory
again, where the others' blocks of 32 MiB are mapped anew in each call (csrc/buffers.h); --tokens 2048 shows what is
left without that.

The second table has the stages: r1mega's time, the bytes that its implementation reads and writes, the fewest that any
can, and which fraction of the bandwidth of a plain copy on this machine that is; then the peers' times. A stage that
works in the cache can exceed 1.

Times are CPU time of the process, on a GPU the time between events of its stream; the median of rounds in which all
take turns. Exit status: 1 where results differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.routing_functions import R1mega, Routed, RoutingFunctions, installed_peers  # noqa: E402
from benchmarks.routing_stages import leaf, routing_stages  # noqa: E402
from benchmarks.stages import OURS, Lines, Rates, table  # noqa: E402
from benchmarks.step import write_json  # noqa: E402
from benchmarks.timing import about, machine_rates, seconds, spread  # noqa: E402
from r1mega.kernels import native  # noqa: E402
from r1mega.kernels.route import RouteOptions, route  # noqa: E402

TARGET = 3.0
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PYTORCH_ONLY = "r1mega, PyTorch only"
Way = Callable[[], tuple[Tensor, ...]]


def random_problem(sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> Routed:
    """Random tokens, choices and upstream gradients."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    tokens, hidden, top_k = sizes["tokens"], sizes["hidden"], sizes["top_k"]
    x, logits = draw(tokens, hidden).to(dtype), draw(tokens, sizes["experts"])
    options = RouteOptions(top_k, normalize=top_k > 1)
    return Routed(x, logits, options, route(logits, None, options), draw(tokens, hidden).to(dtype))


def whole_path(functions: RoutingFunctions, given: Routed, grad_R: Tensor) -> tuple[Tensor, ...]:
    """Permutation and combination: both results and both gradients."""
    x, weights = leaf(given.x_TH), leaf(functions.weights)
    rows, row_weights, order = functions.permute(x, weights)
    out = functions.combine(rows, order)
    return out, row_weights, *torch.autograd.grad((out, row_weights), (x, weights), (given.grad_TH, grad_R))


def without_extension(work: Way) -> tuple[Tensor, ...]:
    library, native.library = native.library, None
    try:
        return work()
    finally:
        native.library = library


def paths(given: Routed) -> dict[str, Way]:
    """The whole paths by name; r1mega's first."""
    generator = torch.Generator(given.x_TH.device).manual_seed(1)
    num_rows = given.choices.experts_TK.numel()
    grad_R = torch.randn(num_rows, generator=generator, device=given.x_TH.device)
    ours = partial(whole_path, R1mega(given, ranked=False), given, grad_R)
    found: dict[str, Way] = {OURS: ours}
    if not given.x_TH.is_cuda:
        found[PYTORCH_ONLY] = partial(without_extension, ours)
    return found | {name: partial(whole_path, peer, given, grad_R) for name, peer in installed_peers(given).items()}


def largest_difference(given: Routed, works: dict[str, Way]) -> float:
    """Between r1mega's results and gradients and those of all others; dense ones where a token chose an expert."""

    def of_choices(tensor: Tensor, shape: torch.Size) -> Tensor:
        return tensor if tensor.shape == shape else tensor.gather(1, given.choices.experts_TK)

    pairs = []
    first, *others = [work() for work in works.values()]
    for other in others:
        pairs += [(a, of_choices(b, a.shape)) for a, b in zip(first, other, strict=True)]
    generator = torch.Generator(given.x_TH.device).manual_seed(2)
    grad_TK = torch.randn(given.choices.experts_TK.shape, generator=generator, device=given.x_TH.device)
    routers = []
    for functions in (R1mega(given), *installed_peers(given).values()):
        logits = leaf(given.logits_TE)
        weights = functions.route(logits)
        grad = given.dense(grad_TK) if weights.shape == logits.shape else grad_TK
        routers.append((of_choices(weights, grad_TK.shape), torch.autograd.grad(weights, logits, grad)[0]))
    for other in routers[1:]:
        pairs += list(zip(routers[0], other, strict=True))
    return max(float((a - b).detach().float().abs().max()) for a, b in pairs)


def print_paths(whole: dict[str, list[float]]) -> dict[str, float]:
    """The first table; how many times r1mega's time each of the others takes."""
    ours = statistics.median(whole[OURS])
    print(f"{'dispatch + combine, both ways':32}{'ms':>8}{'range':>18}{'times r1mega':>15}")
    for name, values in whole.items():
        median = statistics.median(values)
        print(f"{name:32}{median * 1e3:8.2f}{spread(values):>18}{median / ours:15.2f}")
    return {name: statistics.median(values) / ours for name, values in whole.items() if name != OURS}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("hidden", 512), ("experts", 32), ("top_k", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default %(default)s")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="calls timed together")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: this PyTorch sees no GPU")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    sizes = {name: getattr(arguments, name) for name in ("tokens", "hidden", "experts", "top_k")}
    given = random_problem(sizes, device, dtype)
    works = paths(given)
    difference = largest_difference(given, works)
    rates = Rates(*machine_rates(device, dtype))
    whole = seconds(works, arguments.rounds, arguments.calls, device)
    lines = Lines(routing_stages(given), rates).measure(arguments.rounds, arguments.calls, device)
    named = " ".join(f"{letter}={size}" for letter, size in zip("THEK", sizes.values(), strict=True))
    print(f"{named}, {arguments.dtype}, {'one thread' if device.type == 'cpu' else 'GPU'}; {native.reason}")
    print(f"copy {rates.copy / 1e9:.1f} GB/s; largest difference of results {difference:.1e}\n")
    slower = print_paths(whole)
    print("\n" + table(lines))
    peers = {name: ratio for name, ratio in slower.items() if name != PYTORCH_ONLY}
    print(f"\n{sum(ratio >= TARGET for ratio in peers.values())} of {len(peers)} peers take {TARGET:g} times as long")
    if arguments.output:
        settings = {"sizes": sizes, "dtype": arguments.dtype, "copy_bytes_per_second": rates.copy}
        result = {"paths": whole, "times_r1mega": slower, "largest_difference": difference, "stages": lines}
        write_json(arguments.output, {**about(device), **settings, **result})
        print(f"written to {arguments.output}")
    return 1 if difference > TOLERANCE[dtype] else 0


if __name__ == "__main__":
    sys.exit(main())
