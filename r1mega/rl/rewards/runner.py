"""The process that computes rewards: forked from a supervisor that has imported what they need, and replaceable."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from r1mega.rl.rewards import processes
from r1mega.rl.rewards.definition import Definition, RewardFailure
from r1mega.rl.rewards.guard import Guard
from r1mega.rl.rewards.sample import Sample
from r1mega.rl.rewards.wire import Channel, Lost

_LONGEST_REASON = 300
_PATIENCE = 0.2  # seconds in which processes that a reward has started may end after it


@dataclass(frozen=True)
class Job:
    """What the processes of a pool compute.

    Args:
        definitions: the rewards by name.
        arguments: of a reward by its name.
        time_limit: seconds a reward.
        memory_limit: MiB a reward.
    """

    definitions: dict[str, Definition]
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    time_limit: float = 10.0
    memory_limit: int = 2048


@dataclass(frozen=True)
class Outcome:
    """What became of a reward.

    Args:
        value: the reward; 0 where it failed.
        failure: why it failed, or None.
        spoiled: the process must not be used again.
    """

    value: float = 0.0
    failure: str | None = None
    spoiled: bool = False


def run(channel: Channel, job: Job, parent: int) -> None:
    """Answer requests (``{"names": […], "sample": {…}}``), an :class:`Outcome` a reward, until the channel closes."""
    os.setsid()
    processes.die_with_parent(parent)
    processes.adopt_orphans()
    _silence()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    guard = Guard()
    with contextlib.suppress(Lost):
        while True:
            request = channel.receive()
            for name in request["names"]:
                channel.send(vars(compute(job, name, request["sample"], guard)))


def compute(job: Job, name: str, sample: dict[str, Any], guard: Guard) -> Outcome:
    """Compute the reward ``name`` of a sample; whatever it does wrong becomes the outcome's failure."""
    definition = job.definitions[name]
    # Copies: a reward that changes what it is given must not change what the next one sees.
    arguments = copy.deepcopy(job.arguments.get(name, {}))
    given = Sample(**copy.deepcopy(sample))
    _seed()
    start = time.monotonic()
    value: Any = None
    failure: str | None = None
    spoiled = False
    with _limits(job, "files" in definition.allow):
        guard.begin(definition.allow)
        try:
            value = definition.function(given, **arguments)
            value = float(value)
        except RewardFailure as error:
            failure = str(error)
        except MemoryError:
            failure, spoiled = f"ran out of memory: may allocate {job.memory_limit} MiB", True
        except BaseException as error:
            failure = _describe(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            tried = guard.end()
    patience = _PATIENCE
    if "processes" in definition.allow:
        # bubblewrap returns before its last process has ended, which on a busy machine takes a while.
        patience = max(patience, 0.9 * (job.time_limit - (time.monotonic() - start)))
    left = "left processes running" if processes.reap(patience) else "left a thread running" if _threads() else None
    if failure is None and not math.isfinite(value):
        failure = f"returned {value}: must be a finite number"
    failure = tried or left or failure
    return Outcome(0.0 if failure else value, failure and _clip(failure), spoiled or left is not None)


@contextlib.contextmanager
def _limits(job: Job, files: bool) -> Iterator[None]:
    """Limits for one reward, on top of what the process uses already, so that earlier ones make no difference."""
    limits = {resource.RLIMIT_CPU: math.ceil(time.process_time() + job.time_limit) + 1}
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            limits[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + (job.memory_limit << 20)
    if not files:
        limits[resource.RLIMIT_FSIZE] = 0
    before = {kind: resource.getrlimit(kind) for kind in limits}
    for kind, limit in limits.items():
        hard = before[kind][1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        for kind, pair in before.items():
            resource.setrlimit(kind, pair)


def _seed() -> None:
    """Every reward starts from the same random numbers."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


def _threads() -> bool:
    return threading.active_count() > 1


def _silence() -> None:
    """What rewards print goes nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _describe(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:
        text = ""
    kind = type(error).__name__
    return f"raised {kind}: {text}" if text else f"raised {kind}"


def _clip(reason: str) -> str:
    return " ".join(reason.split())[:_LONGEST_REASON]
