"""How much of the experts' communication an overlapped forward and backward hides.

    python benchmarks/expert_overlap.py                       # two ranks, messages that take 20 ms
    python benchmarks/expert_overlap.py --latency_ms 5 --num_layers 4

Two ranks of an expert-parallel group train a small mixture of experts with one pipeline stage, first with a table that
runs forwards and backwards one by one, then with one that overlaps the forward of a microbatch with the backward of
the one before (``(0F1;0B0)``). On one machine a message is there almost at once, so each is held back until
``latency_ms`` after it was sent, as a network would (all but the few counts that go before the rows). Reported for
each table: the seconds that a rank spent waiting for messages in a step, and the step's time; then the share of the
waiting that the overlap has hidden. The floor is the latency of the messages of one microbatch, which no other
microbatch can cover (the first forward, the last backward).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def rows(num_microbatches: int, overlapped: bool) -> str:
    """The table of one rank as CSV."""
    last = num_microbatches - 1
    middle = [f"(0F{m};0B{m - 1})" if overlapped else f"0F{m},0B{m - 1}" for m in range(1, num_microbatches)]
    return ",".join(["0F0", *middle, f"0B{last}", "0R"])


def measure(arguments: argparse.Namespace) -> None:
    """One rank: both tables in turn; rank 0 prints a line of JSON."""
    import torch
    import torch.distributed as dist

    from r1mega.config import AttentionConfig, ModelConfig, MoEConfig
    from r1mega.data.batch import Batch
    from r1mega.model.blocks import list_blocks
    from r1mega.model.init import initialize
    from r1mega.model.stage import build_stage
    from r1mega.moe.collectives import InFlight
    from r1mega.parallel_state import Layout, ParallelState
    from r1mega.pipeline.actions import Table
    from r1mega.pipeline.executor import PipelineExecutor

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    waited = [0.0]
    begin, wait = InFlight.__init__, InFlight.wait

    def timed_begin(self, *args) -> None:
        begin(self, *args)
        self.sent = time.perf_counter()

    def timed_wait(self):
        start = time.perf_counter()
        time.sleep(max(0.0, self.sent + arguments.latency_ms / 1000 - start))
        found = wait(self)
        waited[0] += time.perf_counter() - start
        return found

    InFlight.__init__, InFlight.wait = timed_begin, timed_wait
    moe = MoEConfig(num_experts=8, top_k=2, ffn_hidden_size=arguments.hidden_size)
    attention = AttentionConfig(kind="gqa", num_heads=4)
    config = ModelConfig(
        vocab_size=1024,
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        attention=attention,
        moe=moe,
    )
    state = ParallelState(Layout(dist.get_world_size(), ep=dist.get_world_size()))
    stage = build_stage(config, state, list_blocks(config, arguments.length), torch.float32, "cpu")
    initialize(stage, config, seed=0)
    tokens = torch.randint(0, 1024, (arguments.microbatches, 1, arguments.length + 1))
    mask = torch.ones(1, arguments.length, dtype=torch.bool)
    count = tokens.numel()
    batches = [Batch(t[:, :-1], t[:, 1:], mask, count, arguments.microbatches) for t in tokens]
    found = {}
    for name, overlapped in (("one by one", False), ("overlapped", True)):
        executor = PipelineExecutor(Table.from_csv(rows(arguments.microbatches, overlapped)), {0: stage}, None)
        steps = []
        for _ in range(arguments.num_steps + 1):
            dist.barrier()
            waited[0], start = 0.0, time.perf_counter()
            executor.run(batches)
            steps.append((waited[0], time.perf_counter() - start))
            for parameter in stage.parameters():
                parameter.grad = None
        waits, walls = zip(*steps[1:], strict=True)
        found[name] = {"waiting_seconds": statistics.median(waits), "step_seconds": statistics.median(walls)}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency_ms", type=float, default=20.0, help="a message takes this long, default %(default)s")
    parser.add_argument("--num_layers", type=int, default=2, help="layers, two messages each way, default %(default)s")
    parser.add_argument("--hidden_size", type=int, default=256, help="default %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens of a microbatch, default %(default)s")
    parser.add_argument("--microbatches", type=int, default=8, help="default %(default)s")
    parser.add_argument("--num_steps", type=int, default=3, help="timed steps, default %(default)s")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON, too")
    arguments = parser.parse_args()
    for name in ("microbatches", "num_steps", "num_layers"):
        if getattr(arguments, name) < (2 if name == "microbatches" else 1):
            parser.error(f"--{name}={getattr(arguments, name)}: must be {2 if name == 'microbatches' else 1} or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if "RANK" in os.environ:
        measure(arguments)
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    print(f"2 ranks, {2 * (arguments.num_steps + 1)} steps ...", file=sys.stderr, flush=True)
    run = subprocess.run([*command, *sys.argv[1:]], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode != 0:
        return run.returncode
    found = json.loads(run.stdout.strip().splitlines()[-1])
    alone, beside = found["one by one"], found["overlapped"]
    messages = 4 * arguments.num_layers  # of a microbatch: to the experts and back, forward and backward
    floor = messages * arguments.latency_ms / 1000
    hidden = 1 - beside["waiting_seconds"] / alone["waiting_seconds"]
    possible = 1 - 1 / arguments.microbatches
    found |= {"floor_seconds": floor, "hidden": hidden, "hidden_at_most": possible, "settings": vars(arguments)}
    print(f"{'':12} waiting s   step s")
    for name in ("one by one", "overlapped"):
        print(f"{name:12} {found[name]['waiting_seconds']:9.3f} {found[name]['step_seconds']:8.3f}")
    print(f"floor        {floor:9.3f}")
    print(
        f"hidden: {hidden:.0%} of the waiting; "
        f"all but one microbatch in {arguments.microbatches} would be {possible:.0%}"
    )
    if arguments.output:
        from r1mega.files import write_whole

        write_whole(Path(arguments.output), json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
