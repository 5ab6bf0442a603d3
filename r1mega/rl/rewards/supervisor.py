"""The child of a pool: imports what the rewards need once, forks the process that computes them, and watches it.

It runs no reward itself, so it is alive whatever a reward does. When the runner hangs, dies or leaves something behind,
it is killed with everything below it, and a fresh one is forked, which takes milliseconds where imports take seconds.
It ends, and all below it, when its own parent closes the channel or dies.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

from r1mega.config import ConfigError
from r1mega.rl.rewards import processes
from r1mega.rl.rewards.definition import check_arguments, resolve
from r1mega.rl.rewards.runner import Job, Outcome, run
from r1mega.rl.rewards.wire import Channel, Garbled, Lost

_IDLE_CHECK = 1.0  # seconds between looks at whether the parent is still there
_DEATH_SECONDS = 1.0  # between the end of a process's connections and its own
_SAMPLES_PER_RUNNER = 1000  # then a fresh one, so that what rewards leak does not add up


def main(descriptor: int, parent: int) -> None:
    """The program of the child.

    Args:
        descriptor: its end of the socket pair.
        parent: the pool's process.
    """
    processes.adopt_orphans()
    channel = Channel(socket.socket(fileno=descriptor), longest=None)
    with contextlib.suppress(Lost):
        try:
            job = _prepare(channel.receive())
        except ConfigError as error:
            channel.send({"error": str(error)})
            return
        channel.send({"ready": True})
        _serve(channel, Supervisor(job, channel), parent)


def _prepare(request: dict[str, Any]) -> Job:
    definitions = {name: resolve(name) for name in request.pop("names")}
    for name, definition in definitions.items():
        check_arguments(name, definition, request["arguments"].get(name, {}))
    gc.collect()
    gc.freeze()  # the runner shares these pages as long as it does not touch them
    return Job(definitions, **request)


def _serve(channel: Channel, supervisor: Supervisor, parent: int) -> None:
    try:
        while os.getppid() == parent:
            try:
                request = channel.receive(_IDLE_CHECK)
            except TimeoutError:
                continue
            channel.send({name: vars(outcome) for name, outcome in supervisor.outcomes(request)})
    finally:
        supervisor.stop()


class Supervisor:
    """Owns the runner.

    Args:
        job: what it computes.
        upstream: the channel to the pool, which the runner must not hold.
    """

    def __init__(self, job: Job, upstream: Channel) -> None:
        self._job = job
        self._upstream = upstream
        self._process: int | None = None
        self._channel: Channel | None = None
        self._samples = 0

    def outcomes(self, request: dict[str, Any]) -> Iterator[tuple[str, Outcome]]:
        """The outcome of each of ``request["names"]``; one that fails costs the others nothing."""
        names = list(request["names"])
        self._samples += 1
        if self._samples % _SAMPLES_PER_RUNNER == 0:
            self.stop()
        while names:
            for outcome in self._attempt(names, request["sample"]):
                yield names.pop(0), outcome

    def _attempt(self, names: list[str], sample: dict[str, Any]) -> Iterator[Outcome]:
        """Outcomes of the first of ``names``, up to one that ends the runner."""
        channel = self._channel or self._start()
        seconds = self._job.time_limit
        try:
            channel.send({"names": names, "sample": sample}, seconds)
            for _ in range(len(names)):
                outcome = _outcome(channel.receive(seconds))
                if outcome.spoiled:
                    self.stop()
                yield outcome
                if outcome.spoiled:
                    return
        except TimeoutError:
            status = self.stop()
            yield Outcome(failure=_death(status) or f"took too long: more than {seconds:g} s")
        except Garbled:
            self.stop()
            yield Outcome(failure="garbled its result")
        except Lost:
            yield Outcome(failure=_death(self.stop(_DEATH_SECONDS)) or "closed its channel")

    def stop(self, patience: float = 0.0) -> int | None:
        """Kill the runner and everything below this process.

        Args:
            patience: seconds in which the runner may end itself.

        Returns the runner's wait status if it has ended itself, else None.
        """
        status = None
        if self._process is not None and self._channel is not None:
            status = processes.wait(self._process, patience)
            self._channel.close()
        processes.kill_children(self._process)
        self._process = self._channel = None
        return status

    def _start(self) -> Channel:
        ours, theirs = socket.socketpair()
        parent = os.getpid()
        self._process = os.fork()
        if self._process == 0:
            try:
                ours.close()
                self._upstream.close()
                run(Channel(theirs, longest=None), self._job, parent)
            finally:
                os._exit(0)
        theirs.close()
        self._channel = Channel(ours)
        return self._channel


def _outcome(message: Any) -> Outcome:
    """What the runner says, if it is an outcome: a reward can write into any descriptor. Raises :class:`Garbled`."""
    match message:
        case {"value": float(value), "failure": str() | None as failure, "spoiled": bool(spoiled)}:
            return Outcome(value, failure, spoiled)
    raise Garbled("not an outcome")


def _death(status: int | None) -> str | None:
    if status is None:
        return None
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return "used too much CPU time"
        return f"died: {signal.Signals(number).name}"
    return f"ended its process: exit status {os.WEXITSTATUS(status)}"
