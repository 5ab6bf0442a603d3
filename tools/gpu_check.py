"""Builds the CUDA kernels, tests all kernels on this machine's GPU, times them, and writes what it found as JSON.

    python tools/gpu_check.py                                    # a few minutes; DeepSeek-V3's sizes
    python tools/gpu_check.py --parts waits layer                # some parts only
    python tools/gpu_check.py --tokens 4096 --hidden 2048 --experts 64 --top_k 6 --groups 1
    python tools/gpu_check.py --output benchmarks/results/my_gpu.json

It needs an NVIDIA GPU and torch, and nvcc for the first part; not pytest, not pybind11, no network and nothing of
r1mega installed. Parts, in this order:

build    csrc/cuda for this GPU, into r1mega/_cuda.so
tests    tests/gpu, in several processes, since most of their time is Triton's compiler (tools/plain_tests.py)
layer    a whole layer and each of its stages: time, fraction, target, PyTorch's operations (benchmarks/gpu_rows.py)
routing  route, permute and combine with many experts, in the same way
waits    each line at which forward and backward of a layer wait for the GPU; none should

Each part runs in processes of its own, for a limited time, and none keeps the next from running: a test that fails, a
kernel that hangs or a wait is noted and shown at the end. The file has the device, the date, all versions, sizes,
times, fractions and failures. It is written anew after each result, always whole, so that a run that is cut off leaves
what it had measured.

Exit status: 0 all is well, 1 something failed or waits, 2 there is no GPU or no torch (one line says so). A target that
is missed is shown, but is not a failure.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.build_cuda import BuildFailed, build, find_nvcc  # noqa: E402
from tools.plain_tests import RESULT  # noqa: E402

SECONDS = {"tests": 300, "layer": 150, "routing": 150, "waits": 120}  # after which a part is ended
PARTS = ("build", *SECONDS)
TEST_FILES = ("tests/gpu/test_route_permute.py", "tests/gpu/test_triton.py")
MOST_TEST_PROCESSES = 8
EXIT_STATUS = "exit status {}"
SIZES = {"tokens": 8192, "hidden": 7168, "experts": 256, "top_k": 8, "groups": 8, "kept_groups": 4,
         "local_experts": 32, "width": 2048}  # fmt: skip


class Missing(Exception):
    """What this machine has not, in one line."""


def require_gpu() -> None:
    """Raises :class:`Missing` where there is nothing to check."""
    if importlib.util.find_spec("torch") is None:
        raise Missing(f"torch is not installed for {sys.executable}")
    import torch

    if torch.version.cuda is None:
        raise Missing(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise Missing("torch finds no NVIDIA GPU here")


def build_kernels() -> str | None:
    """Builds for this GPU alone, which is quick. Returns what went wrong."""
    import torch

    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc: set CUDA_HOME, or put it into PATH"
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}a" if major >= 9 else f"{major}{minor}"
    try:
        build(nvcc, [arch])
    except BuildFailed as error:
        print(error, file=sys.stderr)
        return f"nvcc does not build csrc/cuda for sm_{arch}"
    return None


def commands(part: str, arguments: argparse.Namespace) -> list[list[str]]:
    """The processes of a part, which run side by side."""
    if part == "tests":
        number = max(1, min(MOST_TEST_PROCESSES, (os.cpu_count() or 1) // 2))
        runner = [sys.executable, "-m", "tools.plain_tests", "--results", *TEST_FILES]
        return [[*runner, f"--share={index}/{number}"] for index in range(number)]
    sizes = [f"--{name}={getattr(arguments, name)}" for name in SIZES]
    return [[sys.executable, "-m", "benchmarks.gpu_rows", part, "--results", *sizes]]


def run_process(command: list[str], seconds: float, take: Callable[[dict], None]) -> str | None:
    """Run a process, hand each of its results to ``take`` and print the rest. Returns what went wrong."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        assert process.stdout
        for line in process.stdout:
            if line.startswith(RESULT):
                take(json.loads(line.removeprefix(RESULT)))
            else:
                print(line, end="", flush=True)
        status = process.wait()
        in_time = timer.is_alive()
        timer.cancel()
    if not in_time:
        return f"ended after {seconds:g} s"
    return EXIT_STATUS.format(status) if status else None


class Record:
    """What a run has found so far, in a file that is written anew with each result."""

    def __init__(self, path: Path, first: dict) -> None:
        self.path, self.result = path, first | {"complete": False, "failures": []}
        self._lock = threading.Lock()
        self.write()

    def add(self, part: str, found: dict) -> None:
        with self._lock:
            self.result.setdefault(part, []).append(found)
            self.write()

    def fail(self, what: str) -> None:
        with self._lock:
            self.result["failures"].append(what)
            self.write()

    def finish(self) -> None:
        self.result["complete"] = True
        self.write()

    def write(self) -> None:
        write_json(self.path, self.result)


def run_part(part: str, arguments: argparse.Namespace, record: Record) -> None:
    """All processes of a part; what failed is in the record."""
    if part == "build":
        problem = build_kernels()
        record.add(part, {"built": problem is None})
        if problem:
            record.fail(f"build: {problem}")
        return
    todo = commands(part, arguments)
    with ThreadPoolExecutor(len(todo)) as pool:
        run = partial(run_process, seconds=SECONDS[part], take=partial(record.add, part))
        problems = list(pool.map(run, todo))
    failures = failures_of(part, record.result.get(part, []))
    # Status 1 says that there are failures; they tell more.
    failures += [problem for problem in problems if problem and not (failures and problem == EXIT_STATUS.format(1))]
    for failure in failures:
        record.fail(f"{part}: {failure}")


def failures_of(part: str, results: list[dict]) -> list[str]:
    """What the results of a part say is wrong."""
    found = [f"{result['name']}: {result['error']}" for result in results if "error" in result]
    if part == "tests":
        ended = {result["test"] for result in results if "test" in result}
        begun = [test for result in results for test in result.get("tests", [])]
        found += [f"{test} did not end" for test in begun if test not in ended]
        for result in results:
            found += [f"{failure['case']} failed" for failure in result.get("failed", [])]
    if part == "waits":
        found += [f"{result['layer']}: {where}" for result in results for where in result.get("waits", [])]
    return found


def summary(result: dict) -> str:
    """A few lines that say how it went."""
    tests = [test for test in result.get("tests", []) if "test" in test]
    lines = []
    if tests:
        counts = (
            sum(test["passed"] for test in tests),
            *(sum(len(t[k]) for t in tests) for k in ("failed", "skipped")),
        )
        lines.append("tests: {} passed, {} failed, {} skipped".format(*counts))
        lines += [f"  skipped: {reason}" for test in tests for reason in test["skipped"]]
    for part in ("layer", "routing"):
        rows = [row for row in result.get(part, []) if row.get("met") is not None]
        missed = [row["row"] for row in rows if not row["met"]]
        if rows:
            told = f"{part}: {len(rows) - len(missed)} of {len(rows)} targets met"
            lines.append(told + (f", missed by {', '.join(missed)}" if missed else ""))
    if "waits" in result:
        lines.append(f"waits: {sum(len(found.get('waits', [])) for found in result['waits'])}")
    failures = result["failures"]
    lines.append(f"{len(failures)} failures" if failures else "nothing failed")
    return "\n".join([*lines, *(f"  {failure}" for failure in failures)])


def about() -> dict:
    """The machine and all versions."""
    import torch

    import r1mega

    nvcc = find_nvcc()
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    properties = torch.cuda.get_device_properties(0)
    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    return {
        "device": properties.name, "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size, "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "r1mega": r1mega.__version__, "commit": commit(), "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton,
        "nvcc": told.strip().splitlines()[-1] if told.strip() else None, "system": platform.platform(),
    }  # fmt: skip


def commit() -> str | None:
    """None where the files are no checkout, or git is missing."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


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
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default benchmarks/results/gpu_<device>.json")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> int:
    require_gpu()
    first = about()
    device = "_".join(first["device"].lower().split())
    path = arguments.output or ROOT / f"benchmarks/results/gpu_{device}.json"
    record = Record(path, first | {"sizes": {name: getattr(arguments, name) for name in SIZES}})
    parts = [part for part in PARTS if part in arguments.parts]
    for number, part in enumerate(parts, 1):
        print(f"\n{number}/{len(parts)} {part}", flush=True)
        started = time.perf_counter()
        run_part(part, arguments, record)
        print(f"{part} took {time.perf_counter() - started:.0f} s", flush=True)
    record.finish()
    print(f"\n{summary(record.result)}\nwritten to {path}")
    return 1 if record.result["failures"] else 0


def main() -> int:
    arguments = parse_arguments()
    try:
        return check(arguments)
    except Missing as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
