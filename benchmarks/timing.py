"""How the benchmarks of the mixture of experts measure: work in turns, what the machine can do, and what it is.

Times are CPU time of the process, on a GPU the time between events of its stream.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from r1mega.kernels import native
from r1mega.kernels.products import matmul

Work = Callable[[], object]


def seconds(works: Mapping[str, Work], rounds: int, calls: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of one call in each round; all take turns, the first round does not count."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            took = _gpu_seconds(work, calls) if device.type == "cuda" else _cpu_seconds(work, calls)
            if index:
                found[name].append(took)
    return found


def _cpu_seconds(work: Work, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls


def _gpu_seconds(work: Work, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy far larger than the cache, operations a second of a large product."""
    size, edge = (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1536)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    works: dict[str, Work] = {"copy": lambda: target.copy_(source), "product": lambda: matmul(a, b)}
    times = seconds(works, 5, 2, device)
    return 2 * size / statistics.median(times["copy"]), 2 * edge**3 / statistics.median(times["product"])


def spread(values: list[float]) -> str:
    """The least and the most, in milliseconds."""
    return f"{min(values) * 1e3:7.2f} -{max(values) * 1e3:7.2f}"


def cpu_name() -> str:
    """The processor's name as Linux tells it, and how many cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def about(device: torch.device) -> dict:
    """What the numbers depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "megatron-core", "transformer_engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "kernels": native.reason,
    }
