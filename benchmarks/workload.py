"""The work that the step benchmark gives to every implementation, and how a step of it is timed.

One model (a decoder whose every layer has attention and routed experts), its initial weights by name, its
tokens by number, and a clock that counts the CPU-seconds of all ranks. An implementation that starts from
:func:`initial_weight`, trains on :func:`sequence` and minimises the mean cross-entropy of a step must report
the loss that every other one reports: that is how the benchmark knows that the work is the same.

The model: pre-norm RMSNorm, multi-head attention with rotary position (halves rotated) and a causal mask,
a softmax router whose chosen weights are normalised, SwiGLU experts, an untied head. Adam, no weight decay,
no clipping; the global gradient norm is computed every step, as training reports it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workload:
    """A model, a step, and an optimizer.

    Args:
        hidden_size: width of the residual stream.
        num_layers: decoder layers, all with routed experts.
        num_heads: attention heads; as many for keys and values; each of width hidden_size / num_heads.
        num_experts: experts of a layer.
        top_k: experts that each token goes to.
        expert_width: width of an expert.
        vocab_size: rows of the embedding and of the head.
        sequence_length: tokens of a sequence; a microbatch is one sequence.
        num_microbatches: microbatches of a step on each data-parallel rank, as a schedule counts them.
        learning_rate: of Adam (beta 0.9 and 0.95, eps 1e-8).
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
    """

    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    expert_width: int = 256
    vocab_size: int = 4096
    sequence_length: int = 256
    num_microbatches: int = 8
    learning_rate: float = 1e-3
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def initial_weight(name: str, shape: tuple[int, ...], std: float = 0.02) -> Tensor:
    """The whole parameter ``name`` at step 0, float32: ones for a norm, else N(0, std) drawn from the name as seed.

    Names and shapes are those of r1mega's model (``layers.3.self_attn.q_proj.weight``).
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * std


def sequence(workload: Workload, index: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[sequence_length]`` of sequence ``index`` of a step; all steps have the same sequences."""
    generator = torch.Generator().manual_seed(index)
    drawn = torch.randint(0, workload.vocab_size, (workload.sequence_length + 1,), generator=generator)
    return drawn[:-1], drawn[1:]


def microbatches_of(workload: Workload, dp_rank: int) -> range:
    """The sequences that data-parallel rank ``dp_rank`` trains on in each step."""
    return range(dp_rank * workload.num_microbatches, (dp_rank + 1) * workload.num_microbatches)


@dataclass
class Measurement:
    """What one run of one implementation reports; a list has one entry a step, the first of them untimed warm-up.

    Args:
        implementation: name and version.
        losses: mean cross-entropy of the step.
        grad_norms: global gradient norm of the step.
        cpu_seconds: CPU time (user and system, all threads) of the step, summed over the ranks.
        wall_seconds: the same step by the clock on the wall.
        tokens_per_step: tokens of a step over all ranks.
        peak_memory_mib: largest resident size of each rank.
    """

    implementation: str
    losses: list[float]
    grad_norms: list[float]
    cpu_seconds: list[float]
    wall_seconds: list[float]
    tokens_per_step: int
    peak_memory_mib: list[int]


def measure(
    implementation: str, tokens_per_step: int, step: Callable[[], tuple[float, float]], num_steps: int
) -> Measurement:
    """Run ``step``, of so many tokens over all ranks, and time it; a collective, to be called on every rank.

    ``step()`` trains one step and returns (this rank's share of the loss, the global gradient norm): the shares add
    up to the loss over the world. Waiting for another rank costs no CPU-seconds; moving bytes does.
    """
    rows = []
    for _ in range(num_steps):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        loss, grad_norm = step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        summed = torch.tensor([loss, cpu], dtype=torch.float64)
        dist.all_reduce(summed)
        rows.append((summed[0].item(), grad_norm, summed[1].item(), wall))
    peak = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    peak[dist.get_rank()] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    dist.all_reduce(peak)
    return Measurement(implementation, *map(list, zip(*rows, strict=True)), tokens_per_step, peak.tolist())


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of a layout and of :class:`Workload`; shared by the programs of the ranks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size, of attention and of the experts")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size (1F1B)")
    parser.add_argument("--ep", type=int, default=1, help="expert parallel size")
    parser.add_argument("--num_steps", type=int, default=6, help="steps to run")
    parser.add_argument(
        "--profile", metavar="FILE", help="profile one more step; rank 0 writes a table of operators here"
    )
    add_workload_arguments(parser)
    return parser


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of :class:`Workload`."""
    group = parser.add_argument_group("workload")
    for field in dataclasses.fields(Workload):
        kind = type(field.default)
        group.add_argument(f"--{field.name}", type=kind, default=field.default, help="default %(default)s")


def workload_from(arguments: argparse.Namespace) -> Workload:
    return Workload(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Workload)})


def start_process_group() -> None:
    """Join torchrun's world over gloo, or make a world of one; one thread unless ``OMP_NUM_THREADS`` says otherwise."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def report(measurement: Measurement) -> None:
    """Rank 0 prints the measurement as one line of JSON."""
    if dist.get_rank() == 0:
        print(json.dumps(dataclasses.asdict(measurement)), flush=True)


def profile_step(step: Callable[[], object], path: str, row_limit: int = 40) -> None:
    """Run one step under torch.profiler on every rank; rank 0 writes its operators, longest first, to ``path``.

    Times are by the clock on the wall: only an idle machine gives numbers worth reading.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    if dist.get_rank() == 0:
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=row_limit)
        with open(path, "w", encoding="utf-8") as file:
            file.write(table + "\n")
