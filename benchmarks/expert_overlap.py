"""How much of the experts' communication is hidden: by an overlapped schedule, and by ``moe.chunks``.

    python benchmarks/expert_overlap.py                       # two ranks, both parts: a minute
    python benchmarks/expert_overlap.py --part schedules --latency_ms 5 --num_layers 4
    python benchmarks/expert_overlap.py --part chunks --chunks 1 2 4 8 --message_over_experts 1

On one machine a message is there almost at once, so each is held back as a network would (all but the few counts that
go before the rows). Reported are the seconds that a rank spent waiting for messages in a step, and the step's time;
then the share of the waiting that was hidden.

*schedules*: two ranks of an expert-parallel group train a small mixture of experts with one pipeline stage, first with
a table that runs forwards and backwards one by one, then with one that overlaps the forward of a microbatch with the
backward of the one before (``(0F1;0B0)``). Each message arrives ``latency_ms`` after it was sent. The floor is the
latency of the messages of one microbatch, which no other microbatch can cover (the first forward, the last backward).

*chunks*: the same ranks run one MoE layer forward and backward. A message with all of the layer's tokens takes
``message_over_experts`` of the time of the experts' forward, which is measured first; a chunk's takes its part of that,
and a rank sends one after the other. No experts run under the way of the first chunk to them and of the last one back,
and they cover no more than their own time (taken as twice as long in the backward): that is what "experts can" hide.
What else there is to do between messages may hide a little more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from r1mega.parallel_state import ParallelState

RANKS, LIMIT_SECONDS = 2, 600
PARTS = ("schedules", "chunks")


class Network:
    """Holds every exchange of rows back, and adds up how long this rank has waited.

    Args:
        seconds: that a message takes.
        in_turn: whether a message sets out only when the one before has arrived.
    """

    def __init__(self, seconds: float = 0.0, in_turn: bool = False) -> None:
        from r1mega.moe.collectives import InFlight

        self.seconds, self.in_turn, self.waited, self.free_at = seconds, in_turn, 0.0, 0.0
        begin, wait, network = InFlight.__init__, InFlight.wait, self

        def timed_begin(self, *args) -> None:  # noqa: ANN001
            begin(self, *args)
            now = time.perf_counter()
            start = max(now, network.free_at) if network.in_turn else now
            self.there_at = network.free_at = start + network.seconds

        def timed_wait(self):  # noqa: ANN001, ANN202
            start = time.perf_counter()
            time.sleep(max(0.0, self.there_at - start))
            found = wait(self)
            network.waited += time.perf_counter() - start
            return found

        self._restore = lambda: (setattr(InFlight, "__init__", begin), setattr(InFlight, "wait", wait))
        InFlight.__init__, InFlight.wait = timed_begin, timed_wait

    def remove(self) -> None:
        """Messages arrive at once again."""
        self._restore()

    def times(self, work: Callable[[], object]) -> tuple[float, float]:
        """How long a rank waits in ``work``, and how long all of it takes."""
        import torch.distributed as dist

        dist.barrier()
        self.waited, self.free_at, start = 0.0, 0.0, time.perf_counter()
        work()
        return self.waited, time.perf_counter() - start


def in_turns(network: Network, works: dict[str, Callable[[], object]], num_steps: int) -> dict[str, dict[str, float]]:
    """Medians over steps in which all take turns; the first does not count."""
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for index in range(num_steps + 1):
        for name, work in works.items():
            times = network.times(work)
            if index:
                steps[name].append(times)
    medians = {
        name: [statistics.median(values) for values in zip(*found, strict=True)] for name, found in steps.items()
    }
    return {name: {"waiting_seconds": wait, "step_seconds": step} for name, (wait, step) in medians.items()}


def rows(num_microbatches: int, overlapped: bool) -> str:
    """The table of one rank as CSV."""
    last = num_microbatches - 1
    middle = [f"(0F{m};0B{m - 1})" if overlapped else f"0F{m},0B{m - 1}" for m in range(1, num_microbatches)]
    return ",".join(["0F0", *middle, f"0B{last}", "0R"])


def measure_schedules(arguments: argparse.Namespace, state: ParallelState, network: Network) -> dict:
    """Waiting and time of a training step with both tables."""
    import torch

    from r1mega.config import AttentionConfig, ModelConfig, MoEConfig
    from r1mega.data.batch import Batch
    from r1mega.model.blocks import list_blocks
    from r1mega.model.init import initialize
    from r1mega.model.stage import build_stage
    from r1mega.pipeline.actions import Table
    from r1mega.pipeline.executor import PipelineExecutor

    network.seconds, network.in_turn = arguments.latency_ms / 1000, False
    size, layers = arguments.hidden_size, arguments.num_layers
    moe = MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=size)
    attention = AttentionConfig(kind="gqa", num_heads=4)
    config = ModelConfig(vocab_size=1024, hidden_size=size, num_layers=layers, attention=attention, moe=moe)
    stage = build_stage(config, state, list_blocks(config, arguments.length), torch.float32, "cpu")
    initialize(stage, config, seed=0)
    tokens = torch.randint(0, 1024, (arguments.microbatches, 1, arguments.length + 1))
    mask = torch.ones(1, arguments.length, dtype=torch.bool)
    batches = [Batch(t[:, :-1], t[:, 1:], mask, tokens.numel(), arguments.microbatches) for t in tokens]

    def step(executor: PipelineExecutor) -> None:
        executor.run(batches)
        for parameter in stage.parameters():
            parameter.grad = None

    works = {}
    for name, overlapped in (("one by one", False), ("overlapped", True)):
        table = Table.from_csv(rows(arguments.microbatches, overlapped))
        works[name] = partial(step, PipelineExecutor(table, {0: stage}, None))
    found: dict = in_turns(network, works, arguments.num_steps)
    messages = 4 * arguments.num_layers  # of a microbatch: to the experts and back, forward and backward
    found["floor_seconds"] = messages * network.seconds
    found["hidden"] = 1 - found["overlapped"]["waiting_seconds"] / found["one by one"]["waiting_seconds"]
    found["hidden_at_most"] = 1 - 1 / arguments.microbatches
    return found


def measure_chunks(arguments: argparse.Namespace, state: ParallelState, network: Network) -> dict:
    """Waiting and time of a layer, forward and backward, for each number of chunks."""
    import torch
    import torch.distributed as dist

    from r1mega.config import MoEConfig
    from r1mega.moe.layer import MoELayer

    tokens, size = arguments.layer_tokens, arguments.layer_hidden
    x, grad = torch.randn(tokens, size, requires_grad=True), torch.randn(tokens, size)
    layers = {}
    for chunks in arguments.chunks:
        torch.manual_seed(state.rank)
        layers[chunks] = MoELayer(size, MoEConfig(8, 2, size, chunks=chunks), state)
    network.seconds, network.in_turn = 0.0, True
    experts = torch.tensor(_experts_seconds(layers[arguments.chunks[0]], x))
    dist.all_reduce(experts, op=dist.ReduceOp.MAX)
    message = arguments.message_over_experts * experts.item()

    def step(chunks: int) -> None:
        network.seconds = message / chunks
        layers[chunks](x, tokens, 1)[0].backward(grad)

    works = {str(chunks): partial(step, chunks) for chunks in arguments.chunks}
    found = in_turns(network, works, arguments.layer_steps)
    whole = found[str(arguments.chunks[0])]["waiting_seconds"]
    for name, line in found.items():
        line |= {
            "hidden": 1 - line["waiting_seconds"] / whole,
            "experts_can_hide": hidden_by_experts(int(name), arguments.message_over_experts),
        }
    return {"experts_seconds": experts.item(), "message_seconds": message, "chunks": found}


def hidden_by_experts(chunks: int, message: float) -> float:
    """The part of a layer's four messages under which there is work, where one takes ``message`` experts' forwards."""
    coverable = 2 * message * (1 - 1 / chunks)
    return (min(1.0, coverable) + min(2.0, coverable)) / (4 * message)


def _experts_seconds(layer, x_TH) -> float:  # noqa: ANN001 - torch is not imported yet
    """What the experts' forward takes in ``layer``."""
    run, parts = layer._run_experts, []

    def timed(*args):  # noqa: ANN002, ANN202
        start = time.perf_counter()
        out = run(*args)
        parts.append(time.perf_counter() - start)
        return out

    layer._run_experts, steps = timed, []
    for _ in range(6):
        parts.clear()
        layer(x_TH, x_TH.shape[0], 1)
        steps.append(sum(parts))
    layer._run_experts = run
    return statistics.median(steps[1:])


def measure(arguments: argparse.Namespace, state: ParallelState) -> dict:
    """One rank: the parts asked for."""
    network = Network()
    parts = {"schedules": measure_schedules, "chunks": measure_chunks}
    try:
        return {name: parts[name](arguments, state, network) for name in PARTS if arguments.part in (name, "all")}
    finally:
        network.remove()


def report(found: dict) -> str:
    """Both parts as text."""
    lines = []
    if "schedules" in found:
        of = found["schedules"]
        lines.append(f"{'schedule':12}{'waiting s':>11}{'step s':>9}")
        for name in ("one by one", "overlapped"):
            lines.append(f"{name:12}{of[name]['waiting_seconds']:11.3f}{of[name]['step_seconds']:9.3f}")
        lines.append(f"{'floor':12}{of['floor_seconds']:11.3f}")
        lines.append(f"hidden: {of['hidden']:.0%} of the waiting; all but one microbatch: {of['hidden_at_most']:.0%}\n")
    if "chunks" in found:
        of = found["chunks"]
        times = f"experts' forward {of['experts_seconds'] * 1e3:.1f} ms, a message {of['message_seconds'] * 1e3:.1f} ms"
        lines.append(f"one layer, forward and backward; {times}")
        lines.append(f"{'chunks':>6}{'waiting ms':>12}{'step ms':>9}{'hidden':>8}{'experts can':>13}")
        for name, line in of["chunks"].items():
            times = f"{line['waiting_seconds'] * 1e3:12.1f}{line['step_seconds'] * 1e3:9.1f}"
            lines.append(f"{name:>6}{times}{line['hidden']:8.0%}{line['experts_can_hide']:13.0%}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="all", choices=(*PARTS, "all"), help="default %(default)s")
    parser.add_argument("--latency_ms", type=float, default=20.0, help="a message takes this long, default %(default)s")
    parser.add_argument("--num_layers", type=int, default=2, help="layers, two messages each way, default %(default)s")
    parser.add_argument("--hidden_size", type=int, default=256, help="default %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens of a microbatch, default %(default)s")
    parser.add_argument("--microbatches", type=int, default=8, help="default %(default)s")
    parser.add_argument("--num_steps", type=int, default=3, help="timed training steps, default %(default)s")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[1, 2, 4], help="the first is compared with, default 1 2 4"
    )
    parser.add_argument("--message_over_experts", type=float, default=0.5, metavar="X", help="default %(default)s")
    parser.add_argument("--layer_tokens", type=int, default=4096, help="of a rank, default %(default)s")
    parser.add_argument("--layer_hidden", type=int, default=512, help="and width of the experts, default %(default)s")
    parser.add_argument("--layer_steps", type=int, default=9, help="timed steps of the layer, default %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON, too")
    arguments = parser.parse_args()
    for name, least in {"microbatches": 2, "num_steps": 1, "num_layers": 1, "layer_steps": 1}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name}={getattr(arguments, name)}: must be {least} or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    from benchmarks.launch import RunFailed, ran_as_rank, run_program

    if ran_as_rank(lambda state: measure(arguments, state)):
        return 0
    try:
        found = run_program("benchmarks.expert_overlap", RANKS, sys.argv[1:], LIMIT_SECONDS)
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    print(report(found))
    if arguments.output:
        import torch

        from benchmarks.timing import about
        from r1mega.files import write_whole

        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        content = {**about(torch.device("cpu")), "settings": settings, **found}
        write_whole(arguments.output, json.dumps(content, indent=1) + "\n")
        print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
