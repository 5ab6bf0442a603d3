"""Builds the CUDA kernels, tests them and times them on this machine's GPU, and writes what it found as one JSON file.

    python tools/gpu_check.py                                    # a few minutes; DeepSeek-V3's sizes
    python tools/gpu_check.py --tokens 4096 --hidden 2048 --experts 64 --top_k 6 --groups 1
    python tools/gpu_check.py --no_build --no_tests              # times only, of kernels that are built
    python tools/gpu_check.py --output benchmarks/results/my_gpu.json

It needs an NVIDIA GPU, torch and nvcc; not pytest, not pybind11, no network and nothing of r1mega installed. Steps:

1. build   csrc/cuda for this GPU, into r1mega/_cuda.so
2. tests   tests/gpu, with pytest where it is installed and plainly where it is not
3. waits   one forward and backward of routing, permutation and combination in which an operation that waits for the GPU
           is an error
4. times   each stage and what it is made of in PyTorch's operations. A stage runs many times in one CUDA graph, in turn
           on inputs that together are several times the cache, so that they come from memory (a router finds its logits
           in the cache, though: `route in cache`); `eager` is the same with launches from Python. The floor is the
           fewest bytes that a stage can move; `of copy` is which part of the bandwidth of a plain copy, measured here,
           that amounts to.

The file has the device, the date, all versions, sizes, times and fractions. It is written whole, at the end, and only
if all tests passed. Exit status: 0 all is well, 1 a build or a test failed, 2 something is missing here (one line says
what).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.build_cuda import BuildFailed, build, find_nvcc  # noqa: E402

COPIED_BYTES = 1 << 30
CACHE_TIMES = 4  # inputs together are at least this many times the second-level cache
ROUNDS, CALLS = 30, 20
Work = Callable[[], object]


class Missing(Exception):
    """What this machine has not, in one line."""


class Failed(Exception):
    """A step that did not succeed, in one line."""


def require_gpu() -> None:
    """Raises :class:`Missing` where there is nothing to check."""
    if importlib.util.find_spec("torch") is None:
        raise Missing(f"torch is not installed for {sys.executable}")
    import torch

    if torch.version.cuda is None:
        raise Missing(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise Missing("torch finds no NVIDIA GPU here")


def build_kernels() -> None:
    """Builds for this GPU alone, which is quick."""
    import torch

    nvcc = find_nvcc()
    if nvcc is None:
        raise Missing("no nvcc: set CUDA_HOME, or put it into PATH")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}a" if major >= 9 else f"{major}{minor}"
    try:
        build(nvcc, [arch])
    except BuildFailed as error:
        print(error, file=sys.stderr)
        raise Failed(f"nvcc does not build csrc/cuda for sm_{arch}") from None


def run_tests() -> str:
    """Runs tests/gpu and returns how."""
    if importlib.util.find_spec("pytest") is None:
        return run_tests_plainly()
    # Not the project's settings: they want the version of pytest that the project pins.
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-o", "markers=gpu", "--rootdir", str(ROOT),
        "-p", "no:cacheprovider",
        "--confcutdir", str(ROOT / "tests/gpu"), "--import-mode=importlib", str(ROOT / "tests/gpu"),
    ]  # fmt: skip
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode:
        raise Failed("a test of tests/gpu failed")
    return "pytest"


def run_tests_plainly() -> str:
    """Runs each function whose name begins with ``test_``, but for those that want what only pytest can give."""
    failed, passed, left_out = [], 0, []
    for path in sorted((ROOT / "tests/gpu").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            left_out.append(f"{path.name} (needs {error.name})")
            continue
        for name, function in vars(module).items():
            if not name.startswith("test_") or not callable(function):
                continue
            if inspect.signature(function).parameters:
                left_out.append(f"{name} (takes arguments)")
                continue
            try:
                function()
                passed += 1
            except Exception:
                traceback.print_exc()
                failed.append(name)
    told = f"without pytest, {passed} passed" + (f"; left out: {', '.join(left_out)}" if left_out else "")
    print(told)
    if failed:
        raise Failed(f"failed: {', '.join(failed)}")
    return told


class Problem:
    """Random logits and tokens, several sets of them, so that together they do not fit into the cache.

    Args:
        tokens: T.
        hidden: H.
        experts: E.
        top_k: K.
        groups: G.
        kept_groups: groups that a token's experts may come from.
    """

    def __init__(self, tokens: int, hidden: int, experts: int, top_k: int, groups: int, kept_groups: int) -> None:
        import torch

        from r1mega.kernels.permute import permute
        from r1mega.kernels.route import RouteOptions, route

        self.tokens, self.hidden, self.num_experts, self.top_k = tokens, hidden, experts, top_k
        self.options = RouteOptions(top_k, "sigmoid", groups, min(kept_groups, groups), True, 2.5)
        generator = torch.Generator("cuda").manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.bias = draw(experts) * 0.1
        self.logits = [draw(tokens, experts) for _ in range(sets(cache, tokens * experts * 4))]
        self.x = [draw(tokens, hidden).bfloat16() for _ in range(sets(cache, tokens * hidden * 2))]
        self.choices = [route(logits, self.bias, self.options) for logits in self.logits]
        chosen = self.choices[0]
        self.decided = chosen.experts_TK, chosen.ranks_TK, chosen.counts_E
        self.rows, self.row_weights, self.row_map = permute(
            self.x[0], chosen.weights_TK, *self.decided, first_row_NE=chosen.first_row_NE
        )
        self.grad_weights = draw(tokens, top_k)


def sets(cache_bytes: int, set_bytes: int) -> int:
    """How many inputs of ``set_bytes`` it takes to be :data:`CACHE_TIMES` times the cache."""
    return max(1, -(-CACHE_TIMES * cache_bytes // max(set_bytes, 1)))


def floors(tokens: int, hidden: int, experts: int, top_k: int, element_bytes: int = 2) -> dict[str, int]:
    """The fewest bytes that each stage can move."""
    tiles, rows = -(-tokens // 64), (1 + top_k) * tokens * hidden * element_bytes
    return {
        "route": 4 * tokens * experts + 8 * tokens * top_k,
        "route in cache": 4 * tokens * experts + 8 * tokens * top_k,
        "scan": 12 * tiles * experts + 8 * experts,
        "permute": rows + 4 * tokens * top_k,
        "combine": rows + 8 * tokens * top_k,
        "route backward": 8 * tokens * top_k + 4 * tokens * experts,
    }


def stages(p: Problem) -> dict[str, tuple[list[Work], list[Work]]]:
    """Of each stage the kernels, one call for each set of inputs, and the same in PyTorch's operations."""
    from r1mega.kernels import cuda
    from r1mega.kernels.combine import combine
    from r1mega.kernels.permute import reference_copy_rows, reference_sum_rows
    from r1mega.kernels.route import reference_rank_choices, reference_route

    of_tiles = [cuda.route(logits, p.bias, p.options) for logits in p.logits]
    first_row = p.choices[0].first_row_NE
    experts, ranks, _ = p.decided

    def reference_backward(given: tuple) -> object:
        import torch

        grad = torch.zeros_like(p.logits[0]).scatter_(1, given[0], p.grad_weights)
        scores = p.logits[0].sigmoid()
        return grad * scores * (1 - scores)

    return {
        "route": (
            [lambda x=x: cuda.route(x, p.bias, p.options) for x in p.logits],
            [lambda x=x: reference_route(x, p.bias, p.options) for x in p.logits],
        ),
        "route in cache": (
            [lambda: cuda.route(p.logits[0], p.bias, p.options)],
            [lambda: reference_route(p.logits[0], p.bias, p.options)],
        ),
        "scan": (
            [lambda g=g: cuda.scan(g[3], g[4]) for g in of_tiles],
            [lambda g=g: reference_rank_choices(g[0], p.num_experts) for g in of_tiles],
        ),
        "permute": (
            [lambda x=x: cuda.permute(x, experts, ranks, first_row) for x in p.x],
            [lambda x=x: reference_copy_rows(x, p.row_map) for x in p.x],
        ),
        "combine": ([lambda: combine(p.rows, p.row_map)], [lambda: reference_sum_rows(p.rows, p.row_map)]),
        "route backward": (
            [
                lambda g=g, x=x: cuda.route_backward(p.grad_weights, g[0], g[5], p.num_experts, p.options, x)
                for g, x in zip(of_tiles, p.logits, strict=True)
            ],
            [lambda g=g: reference_backward(g) for g in of_tiles],
        ),
    }


def waits(p: Problem) -> None:
    """One forward and backward; raises :class:`Failed` where an operation waits for the GPU."""
    import torch

    from r1mega.kernels.combine import combine
    from r1mega.kernels.permute import permute
    from r1mega.kernels.route import route

    logits, x = p.logits[0].clone().requires_grad_(), p.x[0].clone().requires_grad_()

    def step() -> None:
        choices = route(logits, p.bias, p.options)
        decided = choices.experts_TK, choices.ranks_TK, choices.counts_E
        rows, weights, row_map = permute(x, choices.weights_TK, *decided, first_row_NE=choices.first_row_NE)
        out = combine(rows * weights.unsqueeze(1).to(rows.dtype), row_map)
        torch.autograd.grad(out, (logits, x), torch.ones_like(out))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        raise Failed(f"an operation waits for the GPU: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def timed(run: Work, calls: int) -> list[float]:
    """Seconds of one call in each round, by CUDA events around ``run``, which makes ``calls`` calls."""
    import torch

    found = []
    for index in range(ROUNDS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if index >= 3:  # the first ones warm up
            found.append(start.elapsed_time(end) / 1e3 / calls)
    return found


def in_turn(works: list[Work]) -> tuple[Work, int]:
    """All of ``works`` one after the other, often enough, and how many calls that is. Results are let go at once."""
    times = max(1, -(-CALLS // len(works)))

    def run() -> None:
        for _ in range(times):
            for work in works:
                work()

    return run, times * len(works)


def eager_seconds(works: list[Work]) -> list[float]:
    """With launches from Python."""
    return timed(*in_turn(works))


def graph_seconds(works: list[Work]) -> list[float]:
    """In a CUDA graph: no gaps between launches."""
    import torch

    run, calls = in_turn(works)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed(graph.replay, calls)


def copy_bandwidth() -> float:
    """Bytes read and written each second by a copy far larger than the cache."""
    import torch

    source = torch.randint(0, 255, (COPIED_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / statistics.median(timed(lambda: target.copy_(source), 1))


def measure(p: Problem) -> list[dict]:
    """A line for each stage."""
    bandwidth = copy_bandwidth()
    least = floors(p.tokens, p.hidden, p.num_experts, p.top_k)
    lines = []
    print(f"copy {bandwidth / 1e12:.2f} TB/s\n{'stage':16}{'us':>10}{'eager us':>10}{'of copy':>9}{'PyTorch us':>12}")
    for name, (works, reference) in stages(p).items():
        seconds, eager, torch_eager = graph_seconds(works), eager_seconds(works), eager_seconds(reference)
        median = statistics.median(seconds)
        fraction = least[name] / median / bandwidth
        lines.append(
            {
                "stage": name, "seconds": seconds, "eager_seconds": eager, "pytorch_eager_seconds": torch_eager,
                "floor_bytes": least[name], "copy_bytes_per_second": bandwidth, "fraction_of_copy": fraction,
            }
        )  # fmt: skip
        of_python, of_torch = (statistics.median(values) * 1e6 for values in (eager, torch_eager))
        print(f"{name:16}{median * 1e6:10.2f}{of_python:10.2f}{fraction:9.2f}{of_torch:12.2f}")
    return lines


def about() -> dict:
    """The machine and all versions."""
    import torch

    import r1mega

    nvcc = find_nvcc()
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    properties = torch.cuda.get_device_properties(0)
    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    return {
        "device": properties.name, "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size, "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "r1mega": r1mega.__version__, "commit": commit.stdout.strip() or None, "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton,
        "nvcc": told.strip().splitlines()[-1] if told.strip() else None, "system": platform.platform(),
    }  # fmt: skip


def write_json(path: Path, result: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as file:
        try:
            json.dump(result, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"tokens": 8192, "hidden": 7168, "experts": 256, "top_k": 8, "groups": 8, "kept_groups": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no_build", action="store_true", help="take r1mega/_cuda.so as it is")
    parser.add_argument("--no_tests", action="store_true", help="times only")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/gpu_<device>.json")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> int:
    require_gpu()
    if not arguments.no_build:
        print("1/4 build", flush=True)
        build_kernels()
    from r1mega.kernels import cuda

    if cuda.library is None:
        raise Missing(cuda.reason)
    tested = "not run"
    if not arguments.no_tests:
        print("2/4 tests", flush=True)
        tested = run_tests()
    names = ("tokens", "hidden", "experts", "top_k", "groups", "kept_groups")
    sizes = {name: getattr(arguments, name) for name in names}
    problem = Problem(**sizes)
    print("3/4 waits", flush=True)
    waits(problem)
    print("4/4 times", flush=True)
    result = {**about(), "sizes": sizes, "tests": tested, "waits": "none", "stages": measure(problem)}
    device = "_".join(result["device"].lower().split())
    output = arguments.output or ROOT / f"benchmarks/results/gpu_{device}.json"
    write_json(output, result)
    print(f"written to {output}")
    return 0


def main() -> int:
    arguments = parse_arguments()
    try:
        return check(arguments)
    except Missing as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
