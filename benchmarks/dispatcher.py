"""Dispatch and combine over ranks: time and bytes on the wire for each type of rows and number of chunks.

    python benchmarks/dispatcher.py                                   # 2 ranks, T=4096, H=512, E=32, K=4: half a minute
    python benchmarks/dispatcher.py --ranks 4 --tokens 1024 --wires model float8 --chunks 1 8
    python benchmarks/dispatcher.py --output benchmarks/results/dispatcher.json

Each rank sends its tokens to the ranks of their experts over gloo, multiplies what arrives with the router's weights
(no experts: what they take is in benchmarks/moe_layer.py), sends the results back and goes back through all of it. All
settings take turns. Reported are the median of the step's time on the wall and of its CPU time, both of the slowest
rank; the bytes that a rank sends to others, forward and backward (most of any rank); and the messages. On one machine
bytes cost next to nothing and narrower rows the time of their conversion, and there are no experts under which chunks
could hide messages: that is benchmarks/expert_overlap.py's to show. Here is what both cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.launch import RunFailed, ran_as_rank, run_program  # noqa: E402
from benchmarks.timing import about  # noqa: E402
from r1mega.files import write_whole  # noqa: E402
from r1mega.kernels.route import RouteOptions, route  # noqa: E402
from r1mega.moe import collectives  # noqa: E402
from r1mega.moe.dispatcher import AllToAllDispatcher, routing_of  # noqa: E402
from r1mega.moe.exchanges import ToExperts, ToTokens  # noqa: E402
from r1mega.moe.overlap import begin  # noqa: E402
from r1mega.moe.router import Routing  # noqa: E402
from r1mega.parallel_state import ParallelState  # noqa: E402

SIZES = {"tokens": 4096, "hidden": 512, "experts": 32, "top_k": 4}
WIRES = ("model", "bfloat16", "float8")
LIMIT_SECONDS = 600


class Sent:
    """Counts the messages of this rank and their bytes for others, until :meth:`stop`."""

    def __init__(self) -> None:
        self.messages, self.num_bytes = 0, 0
        self._all_to_all = collectives.all_to_all
        collectives.all_to_all = self._counted

    def _counted(self, rows: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup):  # noqa: ANN202
        row_bytes = rows.nbytes // max(rows.shape[0], 1)
        self.messages += 1
        self.num_bytes += (sum(send) - send[group.rank()]) * row_bytes
        return self._all_to_all(rows, receive, send, group)

    def stop(self) -> None:
        collectives.all_to_all = self._all_to_all

    def take(self) -> tuple[int, int]:
        """Messages and bytes since the last time."""
        found, self.messages, self.num_bytes = (self.messages, self.num_bytes), 0, 0
        return found


def step(dispatcher: AllToAllDispatcher, x_TH: Tensor, routing: Routing, chunks: int, grad_TH: Tensor) -> Tensor:
    """There and back, forward and backward, in the order of a layer with ``moe.chunks``; returns the output."""
    parts = dispatcher.prepare_chunks(x_TH, routing, chunks)
    plans = [d.plan for d in parts if d.plan is not None]
    going = [begin(ToExperts(plan), *d.inputs) for plan, d in zip(plans, parts, strict=True)]
    coming = []
    for plan, begun in zip(plans, going, strict=True):
        rows, weights = begun.wait()
        coming.append(begin(ToTokens(plan), rows * weights.unsqueeze(1).to(rows.dtype)))
    output = torch.cat([begun.wait()[0] for begun in coming])
    output.backward(grad_TH)
    return output.detach()


def measure(arguments: argparse.Namespace, state: ParallelState) -> list[dict]:
    """One rank: all settings in turn. The same list on every rank."""
    generator, dtype = torch.Generator().manual_seed(state.rank), getattr(torch, arguments.dtype)
    x, grad = (torch.randn(arguments.tokens, arguments.hidden, generator=generator).to(dtype) for _ in range(2))
    logits = torch.randn(arguments.tokens, arguments.experts, generator=generator)
    choices = route(logits, None, RouteOptions(arguments.top_k))
    exact = x * choices.weights_TK.sum(1, keepdim=True).to(dtype)
    routing = routing_of(choices.experts_TK, choices.weights_TK.requires_grad_(), arguments.experts)
    x.requires_grad_()
    dispatchers = {
        wire: AllToAllDispatcher(arguments.experts, state.group("ep"), wire=wire) for wire in arguments.wires
    }
    found: dict[tuple[str, int], list] = {(wire, n): [] for wire in arguments.wires for n in arguments.chunks}
    sent = Sent()
    for index in range(arguments.num_steps + 1):  # the first is compared, the others are timed
        for (wire, chunks), steps in found.items():
            dist.barrier()
            sent.take()
            wall, cpu = time.perf_counter(), time.process_time()
            output = step(dispatchers[wire], x, routing, chunks, grad)
            times = time.perf_counter() - wall, time.process_time() - cpu
            if index:
                steps.append((*times, *sent.take()))
            else:
                error = ((output - exact).abs().max() / exact.abs().max()).item()
                assert error < 0.1, f"wire {wire}, {chunks} chunks: results differ by {error}"
    sent.stop()
    return [_line(setting, steps, arguments.ranks) for setting, steps in found.items()]


def _line(setting: tuple[str, int], steps: list, num_ranks: int) -> dict:
    """The most of any rank, of its medians."""
    everyone: list = [None] * num_ranks
    dist.all_gather_object(everyone, [statistics.median(values) for values in zip(*steps, strict=True)])
    wall, cpu, messages, num_bytes = (max(values) for values in zip(*everyone, strict=True))
    line = {"wire": setting[0], "chunks": setting[1], "step_seconds": wall, "cpu_seconds": cpu}
    return line | {"messages": int(messages), "bytes_sent": int(num_bytes)}


def table(lines: list[dict], tokens: int) -> str:
    """The lines as text."""
    rows = [
        f"{'wire':10}{'chunks':>8}{'step ms':>10}{'CPU ms':>10}{'messages':>10}{'MB sent':>10}{'bytes a token':>15}"
    ]
    for line in lines:
        times = f"{line['step_seconds'] * 1e3:10.1f}{line['cpu_seconds'] * 1e3:10.1f}"
        sent = f"{line['messages']:10}{line['bytes_sent'] / 1e6:10.2f}{line['bytes_sent'] / max(tokens, 1):15.0f}"
        rows.append(f"{line['wire']:10}{line['chunks']:8}{times}{sent}")
    return "\n".join(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="of the expert-parallel group, default %(default)s")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s; tokens are of a rank")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the rows")
    parser.add_argument("--wires", nargs="+", default=WIRES, choices=WIRES, help="default: all")
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 2, 4], help="default: 1 2 4")
    parser.add_argument("--num_steps", type=int, default=15, help="timed steps of each, default %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all as JSON, too")
    arguments = parser.parse_args()
    if arguments.ranks < 2 or arguments.experts % arguments.ranks:
        parser.error(f"--ranks={arguments.ranks}: must be 2 or more and divide --experts ({arguments.experts})")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if ran_as_rank(lambda state: measure(arguments, state)):
        return 0
    try:
        lines = run_program("benchmarks.dispatcher", arguments.ranks, sys.argv[1:], LIMIT_SECONDS)
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    sizes = " ".join(f"{letter}={getattr(arguments, name)}" for letter, name in zip("THEK", SIZES, strict=True))
    print(f"{arguments.ranks} ranks over gloo, one thread each; {sizes}, {arguments.dtype}\n")
    print(table(lines, arguments.tokens))
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        content = {**about(torch.device("cpu")), "settings": settings, "lines": lines}
        write_whole(arguments.output, json.dumps(content, indent=1) + "\n")
        print(f"\nwritten to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
