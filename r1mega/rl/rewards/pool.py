"""The pool: samples in, futures of scores out; each child process is one that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from r1mega.config import ConfigError, require
from r1mega.rl.rewards import processes
from r1mega.rl.rewards.options import RewardOptions
from r1mega.rl.rewards.sample import Sample, Scores
from r1mega.rl.rewards.wire import Channel, Lost

_START_SECONDS = 120.0
_GRACE = 30.0  # seconds, for a machine that is busy, on top of what the child itself allows
_PROGRAM = """\
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from r1mega.rl.rewards.supervisor import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""
_ENVIRONMENT = {
    # The same order of sets everywhere, no files of compiled modules, and one thread a process.
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def check_rewards(options: RewardOptions) -> None:
    """Start a pool and close it: everything that can be wrong with ``options`` on this machine is found.

    Raises :class:`ConfigError`: an import that fails, arguments that do not fit, a sandbox that is missing.
    """
    RewardPool(options, num_workers=1).close()


class RewardPool:
    """Processes that compute the rewards of samples.

    A reward that raises, hangs, crashes, eats memory, or does what it may not (write files, open sockets, start
    processes) costs that one sample that one reward, and is counted: nothing else changes. Its process is killed with
    all that it started, and replaced. What comes out for a sample does not depend on the number of processes, on other
    samples or on the order, as long as rewards are pure functions and well within their time limit.

    Usable from any thread. Close it, or use it in a ``with`` statement.

    Args:
        options: which rewards.
        num_workers: samples that are worked on at a time; each is a process that waits and one that computes.

    Raises :class:`ConfigError` where a reward cannot be imported or run here.
    """

    def __init__(self, options: RewardOptions, num_workers: int = 1) -> None:
        require(num_workers > 0, "num_workers", num_workers, "must be positive")
        self.options = options
        self._closed = False
        self._lock = threading.Lock()
        self._failures: dict[str, Counter[str]] = {name: Counter() for name in options.names}
        self._workers: set[_Worker] = set()
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        try:
            started = [self._launch() for _ in range(num_workers)]
            for worker in started:
                worker.wait_until_ready()
                self._idle.put(worker)
        except BaseException:
            self._kill_workers()
            raise
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="rewards")

    def submit(self, sample: Sample) -> Future[Scores]:
        """Compute all rewards of ``sample``. Raises :class:`ValueError` where a field of it cannot be sent."""
        return self._threads.submit(self._score, json.loads(sample.to_json()))

    def failures(self) -> dict[str, dict[str, int]]:
        """How many rewards have failed so far: by the reward's name and by what happened."""
        with self._lock:
            return {name: dict(counts) for name, counts in self._failures.items() if counts}

    def close(self) -> None:
        """End all processes and threads; samples that are not done are given up, their futures cancelled or failed."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._kill_workers()
        self._threads.shutdown(wait=True)
        self._kill_workers()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score(self, sample: dict[str, Any]) -> Scores:
        names = self.options.names
        worker = self._idle.get()
        outcomes: dict[str, dict[str, Any]] = {}
        try:
            try:
                worker = worker or self._replacement()
                outcomes = worker.compute(names, sample)
            except Lost:
                # The child itself is gone. Which reward did that is found by computing them one at a time.
                for name in names:
                    worker = self._replace(worker)
                    try:
                        outcomes |= worker.compute([name], sample)
                    except Lost:
                        outcomes[name] = {"value": 0.0, "failure": "ended its process: and the one that watched it"}
        except BaseException:
            self._discard(worker)
            worker = None
            raise
        finally:
            self._idle.put(worker)
        return self._scores(outcomes)

    def _scores(self, outcomes: dict[str, dict[str, Any]]) -> Scores:
        values = {name: float(outcomes[name]["value"]) for name in self.options.names}
        failures = {name: outcome["failure"] for name, outcome in outcomes.items() if outcome["failure"] is not None}
        with self._lock:
            for name, reason in failures.items():
                self._failures[name][reason.partition(":")[0]] += 1
        return Scores(sum(self.options.weight(name) * value for name, value in values.items()), values, failures)

    def _launch(self) -> _Worker:
        worker = _Worker(self.options)
        with self._lock:
            self._workers.add(worker)
        return worker

    def _replacement(self) -> _Worker:
        if self._closed:
            raise RuntimeError("the pool of rewards was closed")
        worker = self._launch()
        worker.wait_until_ready()
        return worker

    def _replace(self, worker: _Worker | None) -> _Worker:
        if worker is not None and worker.alive:
            return worker
        self._discard(worker)
        return self._replacement()

    def _discard(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.kill()
            with self._lock:
                self._workers.discard(worker)

    def _kill_workers(self) -> None:
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            worker.say_goodbye()
        for worker in workers:
            self._discard(worker)


class _Worker:
    """A child process, from the pool's side."""

    def __init__(self, options: RewardOptions) -> None:
        ours, theirs = socket.socketpair()
        self._limit = options.time_limit
        self._channel = Channel(ours)
        self._lock = threading.Lock()
        self.alive = True
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in kill)
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=os.environ | _ENVIRONMENT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        job = {name: getattr(options, name) for name in ("names", "arguments", "time_limit", "memory_limit")}
        with contextlib.suppress(Lost, TimeoutError):
            self._channel.send(job, _START_SECONDS)

    def wait_until_ready(self) -> None:
        """Until the rewards are imported. Raises :class:`ConfigError` where they cannot be."""
        try:
            answer = self._channel.receive(_START_SECONDS)
        except TimeoutError as error:
            raise ConfigError(f"rewards: importing them took more than {_START_SECONDS:g} s") from error
        except Lost as error:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise ConfigError(f"rewards: the process that computes them ended at its start: {said[-1]}") from error
        if "error" in answer:
            raise ConfigError(answer["error"])

    def compute(self, names: list[str], sample: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The outcome of each reward. Raises :class:`Lost` where the child is gone, or stuck, and then killed."""
        try:
            self._channel.send({"names": names, "sample": sample}, _GRACE)
            outcomes = self._channel.receive(2 * len(names) * self._limit + _GRACE)
            if not isinstance(outcomes, dict) or set(outcomes) != set(names):
                raise Lost("not an answer")
            return outcomes
        except (Lost, TimeoutError) as error:
            self.kill()
            raise Lost("the child is gone") from error

    def say_goodbye(self) -> None:
        """Close the channel, on which the child kills what it started, and ends."""
        self._channel.shut()

    def kill(self) -> None:
        """End the child: it has a moment to do so itself."""
        with self._lock:
            if not self.alive:
                return
            self.alive = False
            self._channel.shut()
            try:
                self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                processes.kill_tree(self._process.pid)
                self._process.wait()
            self._channel.close()
            self._errors.close()
