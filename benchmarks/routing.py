"""Dispatch and combine of one MoE layer on one CPU thread: r1mega beside PyTorch's operations and megatron-core.

    python benchmarks/routing.py                                             # T=4096, H=512, E=32, K=4: half a minute
    python benchmarks/routing.py --tokens 8192 --hidden 2048 --experts 256 --top_k 8
    python benchmarks/routing.py --output benchmarks/results/routing.json

The first table compares whole paths, forward and backward: the tokens' rows and weights to expert order, then the sum
of each token's rows, with gradients of tokens and weights. The experts between them are left out. Each path starts from
what its own router hands over: r1mega and ``argsort`` from the experts of each token (r1mega's ranks are counted in,
although ``route`` makes them on the way), Megatron's ``permute`` and ``unpermute``, as its all-to-all dispatcher calls
them, from a dense map and dense probabilities, whose making is not counted. Results are compared before they are
timed. A large part of r1mega's lead at the default sizes is that its large results use their memory again, where the
others' blocks of 32 MiB are mapped anew in each call (csrc/buffers.h); --tokens 2048 shows what is left without that.

The second table has r1mega's stages: time, the fewest bytes that a stage can move, and which fraction of the bandwidth
of a plain copy on this machine that is. A stage that works in the cache can exceed 1.

Times are CPU time of the process, the median of rounds in which all take turns. Exit status: 1 where results differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.step import machine, write_json  # noqa: E402
from r1mega.data.megatron import quiet_import  # noqa: E402
from r1mega.kernels import native  # noqa: E402
from r1mega.kernels.combine import combine  # noqa: E402
from r1mega.kernels.permute import permute  # noqa: E402
from r1mega.kernels.route import RouteOptions, rank_choices, route  # noqa: E402

TARGET = 3.0
TOLERANCE = 1e-4
COPIED_BYTES = 1 << 27
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Problem:
    """Random tokens, choices and upstream gradients; float32.

    Args:
        tokens: T.
        hidden: H.
        experts: E.
        top_k: K.
    """

    def __init__(self, tokens: int, hidden: int, experts: int, top_k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens, self.hidden, self.num_experts, self.top_k = tokens, hidden, experts, top_k
        self.x_TH = torch.randn(tokens, hidden, generator=generator).requires_grad_()
        self.logits_TE = torch.randn(tokens, experts, generator=generator).requires_grad_()
        self.options = RouteOptions(top_k)
        self.choices = route(self.logits_TE.detach(), None, self.options)
        self.experts_TK, self.weights_TK = self.choices.experts_TK, self.choices.weights_TK.requires_grad_()
        self.grad_TH = torch.randn(tokens, hidden, generator=generator)
        self.grad_R = torch.randn(tokens * top_k, generator=generator)
        zeros = torch.zeros(tokens, experts)
        self.probs_TE = zeros.scatter(1, self.experts_TK, self.weights_TK.detach()).requires_grad_()
        self.map_TE = zeros.bool().scatter_(1, self.experts_TK, True)


def r1mega_path(p: Problem, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    rows, row_weights, row_map = permute(x, weights, p.experts_TK, *rank_choices(p.experts_TK, p.num_experts))
    return combine(rows, row_map), row_weights


def argsort_path(p: Problem, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = p.experts_TK.flatten().argsort(stable=True)
    token_of_row = order // p.top_k
    rows = x.index_select(0, token_of_row)
    return torch.zeros_like(x).index_add(0, token_of_row, rows), weights.flatten().index_select(0, order)


def megatron_path(moe_utils, p: Problem, x: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    rows, row_probs, order = moe_utils.permute(x, p.map_TE, probs=probs, num_out_tokens=p.tokens * p.top_k)
    return moe_utils.unpermute(rows, order, x.shape), row_probs


def forward_and_backward(forward: Forward, p: Problem, weights: Tensor) -> tuple[Tensor, ...]:
    """Both results and both gradients."""
    out, row_weights = forward(p.x_TH, weights)
    return out, row_weights, *torch.autograd.grad((out, row_weights), (p.x_TH, weights), (p.grad_TH, p.grad_R))


def without_extension(work: Callable[[], object]) -> object:
    library, native.library = native.library, None
    try:
        return work()
    finally:
        native.library = library


def paths(p: Problem) -> dict[str, Callable[[], object]]:
    """The whole paths by name; r1mega's first."""
    ours = partial(forward_and_backward, partial(r1mega_path, p), p, p.weights_TK)
    works: dict[str, Callable[[], object]] = {"r1mega": ours, "r1mega, PyTorch only": partial(without_extension, ours)}
    works["argsort + index_add"] = partial(forward_and_backward, partial(argsort_path, p), p, p.weights_TK)
    try:
        with quiet_import():
            from megatron.core.transformer.moe import moe_utils
    except ImportError:
        return works
    works["megatron-core"] = partial(forward_and_backward, partial(megatron_path, moe_utils, p), p, p.probs_TE)
    return works


def largest_difference(p: Problem, works: dict[str, Callable[[], object]]) -> float:
    """Between the results and gradients of the first path and those of all others."""
    (first, *others) = [work() for work in works.values()]
    worst = 0.0
    for other in others:
        *rest, grad = other
        if grad.shape != p.weights_TK.shape:
            grad = grad.gather(1, p.experts_TK)
        for a, b in zip(first, (*rest, grad), strict=True):
            worst = max(worst, float((a - b).detach().abs().max()))
    return worst


def stages(p: Problem) -> dict[str, tuple[Callable[[], object], int]]:
    """r1mega's stages: work, and the fewest bytes that it can move."""
    choices, row_bytes, choice_bytes = p.choices, p.hidden * 4, p.tokens * p.top_k * 8
    decided = choices.experts_TK, choices.ranks_TK, choices.counts_E
    rows, row_weights, row_map = permute(p.x_TH, p.weights_TK, *decided)
    leaf = rows.detach().requires_grad_()
    routed, out = route(p.logits_TE, None, p.options), combine(leaf, row_map)
    grad_rows = torch.randn_like(leaf)
    keep = partial(torch.autograd.grad, retain_graph=True)
    once_and_k = (1 + p.top_k) * p.tokens * row_bytes
    leaves = p.x_TH, p.weights_TK
    return {
        "route": (lambda: route(p.logits_TE, None, p.options), p.logits_TE.nbytes + choice_bytes),
        "permute": (lambda: permute(p.x_TH, p.weights_TK, *decided), once_and_k + choice_bytes // 2),
        "combine": (lambda: combine(leaf, row_map), once_and_k + choice_bytes),
        "combine backward": (lambda: keep(out, leaf, p.grad_TH), once_and_k),
        "permute backward": (lambda: keep((rows, row_weights), leaves, (grad_rows, p.grad_R)), once_and_k),
        "route backward": (
            lambda: keep(routed.weights_TK, p.logits_TE, p.weights_TK.detach()), choice_bytes + p.logits_TE.nbytes
        ),
    }  # fmt: skip


def seconds(works: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, list[float]]:
    """CPU-seconds of one call in each round."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):  # the first round warms up
        for name, work in works.items():
            start = time.process_time()
            for _ in range(calls):
                work()
            if index:
                found[name].append((time.process_time() - start) / calls)
    return found


def copy_bandwidth() -> float:
    """Bytes read and written each second by a copy far larger than the cache."""
    source, target = torch.ones(COPIED_BYTES // 4), torch.empty(COPIED_BYTES // 4)
    times = seconds({"copy": lambda: target.copy_(source)}, rounds=7, calls=2)["copy"]
    return 2 * COPIED_BYTES / statistics.median(times)


def spread(values: list[float]) -> str:
    return f"{min(values) * 1e3:7.2f} -{max(values) * 1e3:7.2f}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("hidden", 512), ("experts", 32), ("top_k", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="calls timed together")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    p = Problem(arguments.tokens, arguments.hidden, arguments.experts, arguments.top_k)
    works, parts = paths(p), stages(p)
    difference = largest_difference(p, works)
    bandwidth = copy_bandwidth()
    whole = seconds(works, arguments.rounds, arguments.calls)
    each = seconds({name: work for name, (work, _) in parts.items()}, arguments.rounds, arguments.calls)
    ours = statistics.median(whole["r1mega"])
    print(f"T={p.tokens} H={p.hidden} E={p.num_experts} K={p.top_k}, float32, one thread; {native.reason}")
    print(f"copy {bandwidth / 1e9:.1f} GB/s; largest difference of results {difference:.1e}\n")
    print(f"{'dispatch + combine, both ways':32}{'ms':>8}{'range':>18}{'times r1mega':>15}")
    for name, values in whole.items():
        median = statistics.median(values)
        print(f"{name:32}{median * 1e3:8.2f}{spread(values):>18}{median / ours:15.2f}")
    print(f"\n{'stage':32}{'ms':>8}{'range':>18}{'MB at least':>15}{'of copy':>9}")
    lines = []
    for name, values in each.items():
        median, floor = statistics.median(values), parts[name][1]
        fraction = floor / median / bandwidth
        lines.append({"stage": name, "seconds": values, "floor_bytes": floor, "fraction_of_copy": fraction})
        print(f"{name:32}{median * 1e3:8.2f}{spread(values):>18}{floor / 1e6:15.1f}{fraction:9.2f}")
    slower = {name: statistics.median(values) / ours for name, values in whole.items() if name != "r1mega"}
    peers = {name: ratio for name, ratio in slower.items() if "r1mega" not in name}
    print(f"\n{sum(ratio >= TARGET for ratio in peers.values())} of {len(peers)} peers take {TARGET:g} times as long")
    if arguments.output:
        sizes = {name: getattr(arguments, name) for name in ("tokens", "hidden", "experts", "top_k")}
        about = {**machine(), "sizes": sizes, "kernels": native.reason, "copy_bytes_per_second": bandwidth}
        result = {"paths": whole, "times_r1mega": slower, "largest_difference": difference, "stages": lines}
        write_json(arguments.output, {**about, **result})
        print(f"written to {arguments.output}")
    return 1 if difference > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main())
