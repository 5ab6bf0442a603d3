"""Rewards that do what none should, named by the tests as ``tests.unit.hostile_rewards:…``."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from r1mega.rl.rewards import RewardFailure, Sample, reward

_calls = 0


def good(sample: Sample) -> float:
    return float(len(sample.completion))


def raises(sample: Sample) -> float:
    raise ValueError("bad\ninput")


def fails_in_its_own_words(sample: Sample) -> float:
    raise RewardFailure("no reference: here")


def hangs(sample: Sample) -> float:
    time.sleep(60)
    return 1.0


def hangs_deaf(sample: Sample) -> float:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def exits(sample: Sample) -> float:
    os._exit(0)


def leaves(sample: Sample) -> float:
    sys.exit(3)


def crashes(sample: Sample) -> float:
    return float(ctypes.string_at(0)[0])


def eats_memory(sample: Sample) -> float:
    return float(len([bytearray(1 << 26) for _ in range(1000)]))


def prints(sample: Sample) -> float:
    print("to stdout")
    print("to stderr", file=sys.stderr)
    os.write(1, b"to the descriptor\n")
    return 1.0


def floods(sample: Sample) -> float:
    block = b"x" * (1 << 20)
    for _ in range(1 << 10):
        os.write(1, block)
    return 1.0


def scribbles(sample: Sample) -> float:
    """Writes into every descriptor there is."""
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b'{"value": 1000.0}\n')
    return 1.0


def forks(sample: Sample) -> float:
    if os.fork() == 0:
        time.sleep(60)
    return 1.0


def forks_past_the_guard(sample: Sample) -> float:
    """A child in a session of its own, made by the C library, that outlives the reward."""
    if ctypes.CDLL(None).fork() == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
    return 1.0


@reward(allow=["processes"])
def leaves_a_daemon(sample: Sample) -> float:
    """Forked twice, in a session of its own: no process group finds it."""
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    os.waitpid(child, 0)
    return 1.0


@reward(allow=["processes"])
def leaves_a_daemon_and_exits(sample: Sample) -> float:
    subprocess.Popen(["sleep", "60"], start_new_session=True)
    os._exit(7)


@reward(allow=["processes"])
def runs_a_program(sample: Sample) -> float:
    return float(subprocess.run(["expr", "40", "+", "2"], capture_output=True, text=True, check=True).stdout)


def kills_its_watcher(sample: Sample) -> float:
    ctypes.CDLL(None).kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
    return 1.0


def stops_its_watcher(sample: Sample) -> float:
    ctypes.CDLL(None).kill(os.getppid(), signal.SIGSTOP)
    return 1.0


def starts_a_thread(sample: Sample) -> float:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return 1.0


def writes_a_file(sample: Sample) -> float:
    Path(sample.data["path"]).write_text("here")
    return 1.0


def writes_a_file_and_hides_it(sample: Sample) -> float:
    with contextlib.suppress(OSError):
        Path(sample.data["path"]).write_text("here")
    return 1.0


def writes_past_the_guard(sample: Sample) -> float:
    library = ctypes.CDLL(None)
    descriptor = library.open(os.fsencode(sample.data["path"]), os.O_WRONLY | os.O_CREAT, 0o600)
    return float(library.write(descriptor, b"here", 4))


@reward(allow=["files"])
def may_write_files(sample: Sample) -> float:
    return float(Path(sample.data["path"]).write_text("here"))


def opens_a_socket(sample: Sample) -> float:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
    return 1.0


def sets_an_alarm(sample: Sample) -> float:
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    return 1.0


def sleeps_a_little(sample: Sample) -> float:
    time.sleep(0.2)
    return 1.0


def returns_nan(sample: Sample) -> float:
    return float("nan")


def returns_text(sample: Sample) -> float:
    return "1.0 and more"  # type: ignore[return-value]


def changes_its_sample(sample: Sample) -> float:
    sample.data["list"].append(1)
    return float(len(sample.data["list"]))


def length_of_list(sample: Sample) -> float:
    return float(len(sample.data["list"]))


def random_number(sample: Sample) -> float:
    return random.random()


def has_torch(sample: Sample) -> float:
    return float("torch" in sys.modules)


def with_settings(sample: Sample, factor: float, offset: float = 0.0) -> float:
    return factor * len(sample.completion) + offset


not_a_function = 3
