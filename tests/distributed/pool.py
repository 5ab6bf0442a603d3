"""A pool of real gloo processes that live as long as the test session, so that a test with ranks costs milliseconds."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor._redistribute
import torch.distributed.tensor.debug

HOST = "127.0.0.1"
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# What is left for the others once one rank has failed: they usually fail at once, because its connections are closed.
GRACE_SECONDS = 10.0


class PoolError(AssertionError):
    """A rank failed, died or did not answer. The message holds the ranks and their tracebacks."""


class WorkerPool:
    """Up to ``max_workers`` processes, started when a job first needs them.

    Args:
        max_workers: largest world.
    """

    def __init__(self, max_workers: int = 8) -> None:
        self.max_workers = max_workers
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self._store: dist.TCPStore | None = None
        self._num_jobs = 0

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call ``function(rank, world_size, *args)`` on ranks 0, 1, ... of a fresh process group; a list of results.

        Args:
            function: at the top level of an importable module; arguments and results are pickled.
            world_size: number of ranks.
            args: further arguments, the same on every rank.
            timeout: seconds until the ranks that have not answered are killed.

        Raises:
            PoolError: naming each rank that raised, died, or did not answer in time.
        """
        assert 1 <= world_size <= self.max_workers, f"world_size={world_size}: this pool has {self.max_workers} workers"
        self._start(world_size)
        self._num_jobs += 1
        job = pickle.dumps((sys.path, self._num_jobs, world_size, timeout))
        call = pickle.dumps((function, args))
        for _, connection in self._workers[:world_size]:
            connection.send_bytes(job)
            connection.send_bytes(call)
        answers = self._collect(world_size, timeout)
        failures = {rank: text for rank, (succeeded, text) in answers.items() if not succeeded}
        silent = [rank for rank in range(world_size) if rank not in answers]
        if silent:
            failures |= {rank: self._fate(rank, timeout) for rank in silent}
            self.close()
        if failures:
            story = "\n\n".join(f"--- rank {rank} of {world_size}: {text}" for rank, text in sorted(failures.items()))
            raise PoolError(f"{function.__name__} failed on ranks {sorted(failures)}\n\n{story}")
        return [answers[rank][1] for rank in range(world_size)]

    def close(self) -> None:
        """Kill the workers; the next job starts new ones."""
        for process, connection in self._workers:
            process.kill()
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()
        self._store = None

    def _start(self, world_size: int) -> None:
        if self._store is None:
            self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        new = range(len(self._workers), world_size)
        with _environment(WORKER_ENVIRONMENT):
            for rank in new:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(rank, self._store.port, theirs), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))
        for rank in new:  # a busy machine may take long to import torch: not on the time of the job
            self._workers[rank][1].recv_bytes()

    def _collect(self, world_size: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        """What the ranks answered by the deadline: (True, result) or (False, traceback)."""
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)
                succeeded = False
                with contextlib.suppress(EOFError, ConnectionError):
                    succeeded, answers[rank] = _answer(connection)
                if not succeeded:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _fate(self, rank: int, timeout: float) -> str:
        process = self._workers[rank][0]
        process.join(0.1)
        code = process.exitcode
        return f"no answer (limit {timeout:g} s)" if code is None else f"the process died with exit code {code}"


def _answer(connection: Connection) -> tuple[bool, tuple[bool, Any]]:
    answer = pickle.loads(connection.recv_bytes())
    return answer[0], answer


@contextlib.contextmanager
def _environment(variables: dict[str, str]):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(rank: int, port: int, connection: Connection) -> None:
    """The life of a worker: one job after the other until the pipe closes."""
    torch.set_num_threads(1)
    caches = _caches()
    gc.freeze()  # what importing made is not looked at after each job: it takes a quarter of a second
    store = dist.TCPStore(HOST, port, is_master=False)
    connection.send_bytes(b"ready")
    while True:
        try:
            sys.path[:], job, world_size, timeout = pickle.loads(connection.recv_bytes())
            call = connection.recv_bytes()
        except EOFError:
            return
        _run_job(call, rank, world_size, dist.PrefixStore(str(job), store), timeout, connection)
        _forget_groups(caches)


def _run_job(
    call: bytes, rank: int, world_size: int, store: dist.Store, timeout: float, connection: Connection
) -> None:
    try:
        function, args = pickle.loads(call)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        # A rank that fails before another has connected makes that one fail there, and the groups of its later jobs
        # would have other names than those of the rest: they would wait for each other.
        if store.add("connected", 1) == world_size:
            store.set("all connected", b"")
        store.wait(["all connected"], timedelta(seconds=timeout))
        connection.send_bytes(pickle.dumps((True, function(rank, world_size, *args))))
        # A rank that leaves early closes its connections, which the others could take for a failure. This comes after
        # the answer, so that a rank that hangs is the only one without.
        with contextlib.suppress(RuntimeError, ValueError):
            dist.barrier()
    except Exception:
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
    if dist.is_initialized():
        dist.destroy_process_group()


def _caches() -> list[Callable[[], None]]:
    """What empties each cache of DTensor's: many of them have device meshes for keys."""
    wrappers = [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper]
    found = [wrapper.cache_clear for wrapper in wrappers if wrapper.__module__.startswith("torch.distributed")]
    for module, name in (
        (torch.distributed.tensor.debug, "_clear_sharding_prop_cache"),
        (torch.distributed.tensor._redistribute, "clear_redistribute_planner_cache"),
    ):
        if hasattr(module, name):
            found.append(getattr(module, name))
    return found


def _forget_groups(caches: list[Callable[[], None]]) -> None:
    """Drop what still refers to the groups of a finished job: cycles, and DTensor's caches with their meshes.

    Each group keeps threads that wake up a hundred times a second: after some hundred jobs the machine did little else.
    """
    for clear in caches:
        clear()
    gc.collect()
