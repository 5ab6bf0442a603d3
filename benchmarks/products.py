"""Matrix products on one CPU thread: r1mega's kernel beside PyTorch's library (MKL or another) and oneDNN.

    python benchmarks/products.py                      # the shapes of the step benchmark, half a minute
    python benchmarks/products.py --shapes 64,512,512  # rows, inputs, outputs of a layer
    python benchmarks/products.py --output benchmarks/results/products.json

Each shape is a linear layer: ``forward`` is x W^T, ``input`` is dy W, ``weight`` is dy^T x added to a gradient. The
table has billions of operations a second (a multiplication and an addition are two); all take turns, and the median of
rounds counts. oneDNN adds no product to a matrix in place: the addition is a pass of its own. ``new shape`` is the
time of a forward with a number of rows that was not seen before, in microseconds: oneDNN compiles a kernel for it.

Exit status: 1 where results differ by more than rounding.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from r1mega.files import write_whole  # noqa: E402
from r1mega.kernels import native  # noqa: E402
from r1mega.kernels.products import add_matmul, matmul, native_multiplies  # noqa: E402

LIBRARIES = ("r1mega", "PyTorch", "oneDNN")
SHAPES = ("256,256,768", "256,256,256", "64,256,512", "64,256,256", "256,256,4096", "37,256,512", "2048,1024,1024")
TOLERANCE = 1e-5
Work = Callable[[], Tensor]


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` by oneDNN, as PyTorch's compiler calls it."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def works(rows: int, inputs: int, outputs: int) -> dict[str, dict[str, Work]]:
    """By product, then by library."""
    x, weight, dy = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    total = torch.zeros(outputs, inputs)
    found: dict[str, dict[str, Work]] = {
        "forward": {"r1mega": lambda: matmul(x, weight.t()), "PyTorch": lambda: torch.mm(x, weight.t())},
        "input": {"r1mega": lambda: matmul(dy, weight), "PyTorch": lambda: torch.mm(dy, weight)},
        "weight": {"r1mega": lambda: add_matmul(total, dy.t(), x), "PyTorch": lambda: total.addmm_(dy.t(), x)},
    }
    if torch.backends.mkldnn.is_available():
        found["forward"]["oneDNN"] = lambda: onednn(x, weight.t())
        found["input"]["oneDNN"] = lambda: onednn(dy, weight)
        found["weight"]["oneDNN"] = lambda: total.add_(onednn(dy.t(), x))
    return found


def measure(by_library: dict[str, Work], calls: int, rounds: int) -> dict[str, float]:
    """Median CPU-seconds of a call."""
    times: dict[str, list[float]] = {name: [] for name in by_library}
    for number in range(rounds + 1):
        for name, work in by_library.items():
            start = time.process_time()
            for _ in range(calls):
                work()
            if number:
                times[name].append((time.process_time() - start) / calls)
    return {name: statistics.median(found) for name, found in times.items()}


def new_shapes(rounds: int) -> dict[str, float]:
    """Median seconds of a forward whose number of rows is new."""
    weight = torch.randn(512, 256)
    multiply = {"r1mega": matmul, "PyTorch": torch.mm}
    if torch.backends.mkldnn.is_available():
        multiply["oneDNN"] = onednn
    times: dict[str, list[float]] = {name: [] for name in multiply}
    for rows in range(3, 3 + 10 * rounds):
        x = torch.randn(rows, 256)
        for name, product in multiply.items():
            start = time.perf_counter()
            product(x, weight.t())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def difference(rows: int, inputs: int, outputs: int) -> float:
    """The largest of r1mega's forward from that in float64, relative to the largest value."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    exact = x.double() @ weight.double().t()
    return ((matmul(x, weight.t()) - exact).abs().max() / exact.abs().max()).item()


def parse(text: str) -> tuple[int, int, int]:
    sizes = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be three positive numbers, rows,inputs,outputs")
    return sizes[0], sizes[1], sizes[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", type=parse, default=[parse(shape) for shape in SHAPES], metavar="ROWS,INPUTS,OUTPUTS")
    add("--rounds", type=int, default=7, help="in which all take turns (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="write all that was measured as JSON, whole or not at all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"float32, one thread; r1mega's kernel {'multiplies' if native_multiplies() else 'is not used'} here")
    print(f"{'rows, inputs, outputs':24}{'product':10}{'r1mega':>9}{'PyTorch':>9}{'oneDNN':>9}   GFLOP/s")
    lines, worst = [], 0.0
    for sizes in arguments.shapes:
        flops = 2 * sizes[0] * sizes[1] * sizes[2]
        worst = max(worst, difference(*sizes))
        for name, by_library in works(*sizes).items():
            found = measure(by_library, max(1, int(2e9 / flops)), arguments.rounds)
            rates = {library: flops / seconds / 1e9 for library, seconds in found.items()}
            lines.append({"rows_inputs_outputs": sizes, "product": name, "gigaflops_per_second": rates})
            cells = "".join(f"{rates[library]:9.0f}" if library in rates else f"{'-':>9}" for library in LIBRARIES)
            print(f"{', '.join(map(str, sizes)):24}{name:10}{cells}", flush=True)
    fresh = new_shapes(arguments.rounds)
    print("new shape, microseconds: " + ", ".join(f"{name} {1e6 * t:.0f}" for name, t in fresh.items()))
    print(f"largest difference from float64, relative: {worst:.1e}")
    if arguments.output:
        about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "kernels": native.reason,
            "load_average": os.getloadavg()[0],
        }
        content = about | {"products": lines, "new_shape_seconds": fresh, "largest_difference": worst}
        write_whole(arguments.output, json.dumps(content, indent=1) + "\n")
        print(f"written to {arguments.output}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
