"""Plants mistakes into the CUDA sources, one at a time, and prints which of them a check finds.

    python -m tests.unit.cuda_host_mutants FOLDER      # builds in FOLDER; prints JSON, mutant to what found it

Each check runs in a process of its own, since a kernel with a mistake may write anywhere.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from r1mega.kernels import cuda
from r1mega.kernels.route import TILE_TOKENS, RouteOptions, reference_rank_choices, reference_route
from tests.unit.cuda_host import SEED, SOURCES, compile_one, random, stepped, use

SEEDS = range(4)

# What is planted: in which file, what it replaces, and by what. Of texts that are there more often, the n-th.
MUTANTS = {
    "no barrier after the tile's masks are cleared": ("route", "  __syncthreads();\n", "", 0),
    "no barrier before candidates become score sums": ("route", "  __syncthreads();\n", "", 1),
    "no barrier before ranks are read": ("route", "  __syncthreads();\n", "", 2),
    "candidates are read before all are there": ("route", "  __syncwarp();\n  const Candidate", "  const Candidate", 0),
    "candidates are replaced before all are read": ("route", "  __syncwarp();\n  if (lane", "  if (lane", 0),
    "lanes without a choice leave": ("route", "const float score =", "if (!writes) return; const float score =", 0),
    "of equal experts the higher wins": ("route", "~unsigned(expert)", "unsigned(expert)", 0),
    "of equal groups the higher wins": ("route", "other < group", "other > group", 0),
    "a token counts as earlier than itself": ("tile", "(1u << token % 32) - 1", "(2u << token % 32) - 1", 0),
    "tokens are counted before all are there": ("rank", "  __syncthreads();\n", "", 1),
    "one by one, an expert is taken twice": ("route", "      keys[v] = 0;\n", "", 0),
    "sums are read before all are there": ("scan", "  __syncthreads();\n", "", 0),
    "experts of earlier lanes are forgotten": ("scan", "sum_up_to(total, lane) - total", "0", 0),
    "all tokens are in the first tile": ("permute", "int(token) / a.tile_tokens", "0", 0),
    "all rows go where the first choice goes": ("permute", "(kWholeWarp, row, k)", "(kWholeWarp, row, 0)", 0),
    "rows are read as if there were no gaps": ("permute", "(a.input_step / int64_t(sizeof(Piece)))", "pieces", 0),
    "gradients are set before all is cleared": ("route_backward", "  __syncwarp();\n  if (has", "  if (has", 0),
}  # fmt: skip


def plant(name: str, folder: Path) -> None:
    """A copy of the sources with one mistake, and of route's kernels only the one that the check below needs."""
    file, correct, wrong, index = MUTANTS[name]
    shutil.copytree(SOURCES, folder)
    path = folder / f"{file}.h"
    parts = path.read_text().split(correct)
    assert len(parts) > index + 1, "the text is not there any more"
    text = correct.join(parts[: index + 1]) + wrong + correct.join(parts[index + 1 :])
    path.write_text(text)
    path = folder / "route.h"
    text = path.read_text()
    for unused in (2, 4, 12):
        text = text.replace(f"  if (a.experts_of_lane <= {unused}) return launch_route<{unused}>(a, stream);\n", "")
    path.write_text(text.replace("  return launch_route<24>(a, stream);\n", "  return cudaErrorInvalidValue;\n"))


def check(kernel: str) -> None:
    """Fails unless the kernel is right."""
    size = 100, 256
    options, (logits, bias) = RouteOptions(6, "sigmoid", 8, 4, factor=2.5), stepped(size)
    expected = reference_route(logits, bias, options)
    experts = expected.experts_TK.contiguous()
    if kernel == "route":
        equal = torch.zeros(3, 256)
        for given in (logits, random(*size), equal):
            _check_route(given, bias if given is logits else None, options)
    elif kernel == "scan":
        counts = torch.randint(0, 64, (70, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        first_row, totals, sums = cuda.scan(counts, counts.float())
        flat = counts.t().flatten()
        assert torch.equal(first_row.t().flatten(), flat.cumsum(0) - flat)
        assert torch.equal(totals, counts.sum(0)) and torch.equal(sums, counts.sum(0).float())
    elif kernel == "rank":
        dropped = experts.clone()
        dropped[::3, ::2] = 256
        for given in (experts, dropped):
            _check_tiles(given, *cuda.rank(given, 256))
    elif kernel == "permute":
        tokens, ranks = random(100, 44)[:, :40], expected.ranks_TK.clone()
        of_first_tile = torch.bincount(experts[:TILE_TOKENS].flatten(), minlength=256)
        ranks[TILE_TOKENS:] -= of_first_tile[experts[TILE_TOKENS:]]
        first_row = expected.first_row_NE + torch.stack([torch.zeros_like(of_first_tile), of_first_tile])
        rows, _ = cuda.permute(tokens, experts, ranks, first_row)
        assert torch.equal(rows, tokens[experts.flatten().argsort(stable=True) // 6])
    else:
        leaf = logits.requires_grad_()
        grad, scores = random(100, 6), leaf.detach().sigmoid().gather(1, experts)
        wanted = torch.autograd.grad(reference_route(leaf, bias, options).weights_TK, leaf, grad)[0]
        torch.testing.assert_close(cuda.route_backward(grad, experts, scores, 256, options), wanted)


def _check_route(logits: Tensor, bias: Tensor | None, options: RouteOptions) -> None:
    experts, weights, ranks, tile_counts, tile_sums, _ = cuda.route(logits, bias, options)
    expected = reference_route(logits, bias, options)
    assert torch.equal(experts, expected.experts_TK)
    torch.testing.assert_close(weights, expected.weights_TK, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tile_sums.sum(0), expected.score_sums_E, rtol=1e-5, atol=1e-5)
    assert torch.equal(tile_counts.sum(0), expected.counts_E)
    _check_tiles(experts, ranks, tile_counts)


def _check_tiles(experts: Tensor, ranks: Tensor, tile_counts: Tensor) -> None:
    """Ranks and counts of each tile; those of dropped choices mean nothing."""
    num_experts = tile_counts.shape[1]
    for tile, first in enumerate(range(0, len(experts), TILE_TOKENS)):
        of_tile = experts[first : first + TILE_TOKENS]
        expected, counts = reference_rank_choices(of_tile, num_experts)
        kept = of_tile < num_experts
        assert torch.equal(tile_counts[tile], counts.int())
        assert torch.equal(ranks[first : first + TILE_TOKENS][kept], expected[kept])


def found_by(name: str, folder: Path) -> str:
    """What finds the mistake; nothing where it is not found."""
    kernel = {"tile": "route"}.get(MUTANTS[name][0], MUTANTS[name][0])
    plant(name, folder)
    compile_one(kernel, folder, folder / "mutant.so")
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_run, args=(kernel, folder / "mutant.so", folder / "found"))
    child.start()
    child.join()
    return f"signal {-child.exitcode}" if child.exitcode else (folder / "found").read_text()


def _run(kernel: str, library: Path, output: Path) -> None:
    use(library)
    output.write_text("")
    for seed in SEEDS:
        os.environ[SEED] = str(seed)
        try:
            check(kernel)
        except (AssertionError, RuntimeError) as error:
            output.write_text(f"{type(error).__name__} in schedule {seed}")
            return


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    print(json.dumps({name: found_by(name, folder / str(index)) for index, name in enumerate(MUTANTS)}))


if __name__ == "__main__":
    main()
