"""The GRPO loss from hidden states and the head's weight, forward and backward: r1mega's policy head beside others.

    python benchmarks/grpo_head.py                        # T=2048, H=512, V=32768, float32 on the CPU: a minute or two
    python benchmarks/grpo_head.py --tp 2                 # and with the vocabulary over two processes as well
    python benchmarks/grpo_head.py --device cuda          # T=8192, H=7168, V=129280, bfloat16 on a GPU
    python benchmarks/grpo_head.py --output benchmarks/results/grpo_head.json

Every path computes log-probabilities, the entropy of the distribution (as a metric; Liger has none) and the GRPO loss
with its KL term, then the gradients of hidden states and weight; losses and gradients are compared before anything is
timed. The paths:

    naive                 log_softmax of all logits, as most training scripts have it
    naive, no entropy     the same without the metric: the least that PyTorch's operations can do
    r1mega                the policy head; "PyTorch only" is it without its C++ or Triton kernels
    r1mega, RL batch      a quarter of the tokens are prompts, half of the rows have advantage 0 (a group of equal
                          rewards), no KL term, one update a rollout; naive takes the same time whatever the batch is
    TRL                   its chunked log-probabilities (trl.kernels.chunked_logprob), where trl is installed
    Liger                 its fused linear GRPO loss, uncompiled, where liger_kernel is installed

Time is CPU time of the process with one thread (--threads), or that of a GPU's events: the median of rounds in which
all take turns. Extra memory is the most that lives at once beyond what was there before, the two gradients, which every
path must make, included; on the CPU it is counted below autograd (benchmarks/tensor_watch.py), the same on every
machine, on a GPU read from PyTorch's allocator. Products are matrix products in units of T x H x V. The floor is the
time of the three products alone, or of as many as a path makes if it makes fewer.

With --tp the weight is cut by rows over processes, which hold one thread each; naive is then the softmax over the cut
vocabulary in PyTorch's operations, and times and memory are those of the rank with the most.

Exit status: 1 where results differ, or where r1mega misses an aim on the CPU at the default sizes or larger: at most
1/8 of naive's extra memory and 0.75 of its time.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.launch import run_program  # noqa: E402
from benchmarks.step import machine, write_json  # noqa: E402
from benchmarks.tensor_watch import TensorWatch  # noqa: E402
from r1mega.kernels import native, triton  # noqa: E402
from r1mega.kernels.products import matmul  # noqa: E402
from r1mega.rl import LossOptions, grpo_loss, grpo_loss_from_hidden  # noqa: E402

MOST_MEMORY, MOST_TIME = 1 / 8, 0.75
SIZES = {"cpu": (2048, 512, 32768), "cuda": (8192, 7168, 129280)}
ROWS = 16
TRL_VOCABULARY_CHUNK = 32768  # as its trainers set it
LIMIT_S = 1800
LossPath = Callable[["Problem"], Tensor]


@dataclass
class Problem:
    """Hidden states ``[T, H]``, this rank's part of the weight, and a rollout of 16 rows; the same on every machine."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    mask: Tensor
    old: Tensor | None
    ref: Tensor
    advantages: Tensor
    options: LossOptions
    temperature: float
    chunk: int | None
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, arguments: argparse.Namespace, group: dist.ProcessGroup | None = None) -> Problem:
        device, generator = arguments.device, torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        tokens, width, vocab = arguments.tokens, arguments.hidden, arguments.vocab
        shape = ROWS, tokens // ROWS
        hidden = torch.randn(tokens, width, generator=generator).to(device, dtype)
        torch.manual_seed(1)
        weight = torch.empty(vocab, width, device=device, dtype=dtype).normal_(std=2 * width**-0.5)
        if group is not None:
            weight = weight.chunk(group.size())[group.rank()].clone()
        targets = torch.randint(vocab, shape, generator=generator).to(device)
        old, ref = (-11 - torch.rand(shape, generator=generator).to(device) for _ in range(2))
        advantages = torch.randn(ROWS, generator=generator).to(device)
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        problem = cls(
            hidden.requires_grad_(), weight.requires_grad_(), targets, mask, old, ref, advantages,
            LossOptions(clip_low=0.999, clip_high=10), arguments.temperature, arguments.chunk, group,
        )  # fmt: skip
        return problem

    def as_rl_batch(self) -> Problem:
        mask = self.mask.clone()
        mask[:, : mask.shape[1] // 4] = False
        advantages = self.advantages.clone()
        advantages[ROWS // 2 :] = 0
        options = LossOptions(kl_coefficient=0)
        return replace(self, mask=mask, advantages=advantages, options=options, old=None)

    def objective(self, log_probs: Tensor) -> Tensor:
        """The loss of log-probabilities ``[T]``."""
        log_probs = log_probs.view(self.mask.shape)
        return grpo_loss(log_probs, self.old, self.ref, self.advantages, self.mask, self.options)[0]


def naive(p: Problem, entropy: bool = True) -> Tensor:
    logits = (p.hidden @ p.weight.t()).float()
    if p.temperature != 1:
        logits = logits / p.temperature
    if p.group is not None:
        return p.objective(cut_log_probs(logits, p, entropy))
    logs = torch.log_softmax(logits, dim=-1)
    if entropy:
        with torch.no_grad():
            _ = -(logs.exp() * logs).sum(-1)
    return p.objective(logs.gather(1, p.targets.view(-1, 1)).squeeze(1))


class SumOverRanks(torch.autograd.Function):
    """All-reduce; every rank has the same loss, so that a gradient is handed on as it is."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def cut_log_probs(logits_TV: Tensor, p: Problem, entropy: bool) -> Tensor:
    """Log-probabilities from logits of a part of the vocabulary, in differentiable operations."""
    assert p.group is not None
    greatest = logits_TV.detach().amax(1)
    dist.all_reduce(greatest, op=dist.ReduceOp.MAX, group=p.group)
    shifted = logits_TV - greatest.unsqueeze(1)
    powers = shifted.exp()
    total = SumOverRanks.apply(powers.sum(1), p.group)
    if entropy:
        with torch.no_grad():
            moment = (powers * shifted).sum(1)
            dist.all_reduce(moment, group=p.group)
            _ = total.log() - moment / total
    ids = p.targets.flatten() - p.group.rank() * logits_TV.shape[1]
    here = (ids >= 0) & (ids < logits_TV.shape[1])
    target = shifted.gather(1, ids.where(here, 0).unsqueeze(1)).squeeze(1)
    return SumOverRanks.apply(target * here, p.group) - total.log()


def r1mega(p: Problem) -> Tensor:
    given = p.targets, p.old, p.ref, p.advantages, p.mask, p.options
    more = {"temperature": p.temperature, "chunk": p.chunk, "group": p.group}
    return grpo_loss_from_hidden(p.hidden, p.weight, *given, **more)[0]


def without_kernels(p: Problem) -> Tensor:
    library, native.library = native.library, None
    takes, triton.takes = triton.takes, lambda *tensors: False
    try:
        return r1mega(p)
    finally:
        native.library, triton.takes = library, takes


def trl(p: Problem) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    given = p.hidden, p.weight, None, p.targets.flatten(), p.temperature, TRL_VOCABULARY_CHUNK
    log_probs, *_ = ChunkedLogProbFunction.apply(*given, None, 1.0, ("entropy",))
    return p.objective(log_probs)


def liger(p: Problem) -> Tensor:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    options = p.options
    loss = LigerFusedLinearGRPOLoss(
        beta=options.kl_coefficient, compiled=False, use_ref_model=True, epsilon_low=options.clip_low,
        epsilon_high=options.clip_high, loss_type="grpo", temperature=p.temperature,
    )  # fmt: skip
    hidden = p.hidden.view(*p.mask.shape, -1)
    given = {"ref_per_token_logps": p.ref, "old_per_token_logps": p.old}
    return loss(hidden, p.weight, p.targets, p.mask.float(), p.advantages, **given)[0]


def rl_batch(p: Problem) -> Tensor:
    return r1mega(p.as_rl_batch())


def paths(p: Problem) -> tuple[dict[str, LossPath], dict[str, str]]:
    """The paths that run here, r1mega's after naive; and why the others do not."""
    found: dict[str, LossPath] = {"naive": naive, "naive, no entropy": functools.partial(naive, entropy=False)}
    found |= {"r1mega": r1mega, "r1mega, PyTorch only": without_kernels, "r1mega, RL batch": rl_batch}
    missing = {}
    for name, path, module in (
        ("TRL", trl, "trl.kernels.chunked_logprob"),
        ("Liger", liger, "liger_kernel.chunked_loss"),
    ):
        if p.group is not None:
            missing[name] = "has no vocabulary over ranks"
            continue
        try:
            __import__(module)
            found[name] = path
        except Exception as error:  # whatever a package does where its device or its own dependencies are missing
            missing[name] = f"not installed, or does not load here: {error}"
    return found, missing


def run(path: LossPath, p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    loss = path(p)
    return loss.detach(), *torch.autograd.grad(loss, (p.hidden, p.weight))


def products_alone(p: Problem) -> None:
    """The least a gradient needs: three products, of one chunk after another would take as long."""
    with torch.no_grad():
        logits = matmul(p.hidden, p.weight.t())
        _ = matmul(logits, p.weight), matmul(logits.t(), p.hidden)


def largest_difference(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Relative to the largest number of each tensor."""
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max())
        for a, b in zip(actual, expected, strict=True)
    )


def count(path: LossPath, p: Problem) -> dict[str, float]:
    """Extra bytes, and matrix products."""
    with TensorWatch(*(value for value in vars(p).values() if isinstance(value, Tensor))) as watch:
        run(path, p)
    peak = watch.peak
    if p.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(path, p)
        peak = torch.cuda.max_memory_allocated() - before
    unit = 2 * p.hidden.shape[0] * p.weight.numel()
    return {"extra_bytes": peak, "products": watch.flops / unit}


def clock(work: Callable[[], Any], p: Problem) -> float:
    if not p.hidden.is_cuda:
        start = time.process_time()
        work()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def measure(p: Problem, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one layout, on one rank."""
    found, missing = paths(p)
    lines: dict[str, dict[str, Any]] = {}
    expected = run(naive, p)
    for name, path in found.items():
        say(f"checking {name}")
        difference = 0.0 if name == "r1mega, RL batch" else largest_difference(run(path, p), expected)
        lines[name] = {"largest_difference": difference, **count(path, p), "seconds": []}
    del expected
    floor: list[float] = []
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for name, path in found.items():
            lines[name]["seconds"].append(clock(functools.partial(run, path, p), p))
        floor.append(clock(functools.partial(products_alone, p), p))
    return {"paths": lines, "missing": missing, "floor_seconds": floor}


def of_all_ranks(result: dict[str, Any]) -> dict[str, Any]:
    """The largest number of any rank."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, result)
    for name, line in result["paths"].items():
        others = [rank["paths"][name] for rank in ranks]
        line["seconds"] = [max(times) for times in zip(*(other["seconds"] for other in others), strict=True)]
        for key in ("extra_bytes", "largest_difference"):
            line[key] = max(other[key] for other in others)
    return result


def table(title: str, result: dict[str, Any]) -> str:
    lines = result["paths"]
    base, floor = lines["naive"], statistics.median(result["floor_seconds"])
    base_time = statistics.median(base["seconds"])
    text = [
        title,
        f"{'':22}{'seconds':>9}{'of naive':>10}{'floor is':>10}{'MiB extra':>11}{'of naive':>10}{'products':>10}",
    ]
    for name, line in lines.items():
        seconds = statistics.median(line["seconds"])
        memory = line["extra_bytes"]
        least = floor * min(line["products"] / 3, 1)
        text.append(
            f"{name:22}{seconds:9.3f}{seconds / base_time:10.2f}{least / seconds:10.0%}{memory / 2**20:11.0f}"
            f"{memory / base['extra_bytes']:10.3f}{line['products']:10.2f}"
        )
    text.append(f"{'three products alone':22}{floor:9.3f}{floor / base_time:10.2f}{'':31}{3:10.2f}")
    text += [f"{name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(text)


def misses(result: dict[str, Any]) -> list[str]:
    """Which aims r1mega misses."""
    ours, base = result["paths"]["r1mega"], result["paths"]["naive"]
    memory = ours["extra_bytes"] / base["extra_bytes"]
    seconds = statistics.median(ours["seconds"]) / statistics.median(base["seconds"])
    found = {f"memory {memory:.3f} of naive, aim {MOST_MEMORY}": memory > MOST_MEMORY}
    found[f"time {seconds:.2f} of naive, aim {MOST_TIME}"] = seconds > MOST_TIME
    return [text for text, missed in found.items() if missed]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=SIZES, default="cpu")
    add("--tokens", type=int, help="T, a multiple of 16 (default: 2048; on a GPU 8192)")
    add("--hidden", type=int, help="H (default: 512; on a GPU 7168)")
    add("--vocab", type=int, help="V (default: 32768; on a GPU 129280)")
    add("--temperature", type=float, default=1.0)
    add("--chunk", type=int, help="tokens of a chunk of r1mega's (default: it chooses)")
    add("--tp", type=int, default=1, help="also with the vocabulary over this many processes (CPU)")
    add("--rounds", type=int, default=3, help="how often each path runs, in turn (default: %(default)s)")
    add("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    add("--output", type=Path, help="JSON file to write")
    add("--as_rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, size in zip(("tokens", "hidden", "vocab"), SIZES[arguments.device], strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, size)
    if arguments.tokens < ROWS or arguments.tokens % ROWS:
        parser.error(f"--tokens {arguments.tokens}: must be a multiple of {ROWS}, the number of rows")
    if arguments.tp < 1 or arguments.vocab % arguments.tp:
        parser.error(f"--tp {arguments.tp}: must divide --vocab ({arguments.vocab})")
    if arguments.tp > 1 and arguments.device == "cuda":
        parser.error("--tp is for the CPU")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return arguments


def as_rank(arguments: argparse.Namespace) -> int:
    """What a process of --tp does; rank 0 prints the result for its parent."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    group = dist.group.WORLD
    first = dist.get_rank() == 0
    result = of_all_ranks(measure(Problem.of(arguments, group), arguments.rounds, progress if first else _nothing))
    if first:
        print(json.dumps(result))
    dist.destroy_process_group()
    return 0


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _nothing(text: str) -> None:
    pass


def main() -> int:
    arguments = parse_arguments()
    if arguments.as_rank:
        return as_rank(arguments)
    torch.set_num_threads(arguments.threads)
    sizes = {name: getattr(arguments, name) for name in ("tokens", "hidden", "vocab", "temperature", "chunk")}
    problem = Problem.of(arguments)
    results = {"tp1": measure(problem, arguments.rounds, progress)}
    del problem
    if arguments.tp > 1:
        given = [f"--{name}={value}" for name, value in sizes.items() if value is not None]
        given += [f"--rounds={arguments.rounds}", "--as_rank"]
        name = f"tp{arguments.tp}"
        results[name] = run_program("benchmarks.grpo_head", arguments.tp, given, LIMIT_S, progress=True)
    progress("")
    text = f"T={arguments.tokens} H={arguments.hidden} V={arguments.vocab}"
    kind = "bfloat16, GPU" if arguments.device == "cuda" else f"float32, CPU; {native.reason}"
    print(f"{text}, {kind}")
    for name, result in results.items():
        processes = f"{name[2:]} processes" if name != "tp1" else f"one process, {arguments.threads} thread(s)"
        print("\n" + table(processes if arguments.device == "cpu" else "one GPU", result))
    tolerance = 3e-2 if arguments.device == "cuda" else 1e-4
    wrong = [
        f"{layout}, {name}: differs from naive by {line['largest_difference']:.1e}"
        for layout, result in results.items()
        for name, line in result["paths"].items()
        if not line["largest_difference"] < tolerance
    ]
    large = arguments.device == "cpu" and all(
        getattr(arguments, n) >= s for n, s in zip(sizes, SIZES["cpu"], strict=False)
    )
    missed = [f"{layout}: {text}" for layout, result in results.items() for text in misses(result) if large]
    print("\n" + ("\n".join(wrong + missed) or "results agree" + ", and the aims are met" * large))
    if arguments.output:
        about = {**machine(), "sizes": sizes, "threads": arguments.threads, "kernels": native.reason}
        about["device"] = torch.cuda.get_device_name() if arguments.device == "cuda" else about["device"]
        write_json(arguments.output, {**about, "aims": {"memory": MOST_MEMORY, "time": MOST_TIME}, "layouts": results})
        print(f"written to {arguments.output}")
    return 1 if wrong or missed else 0


if __name__ == "__main__":
    sys.exit(main())
