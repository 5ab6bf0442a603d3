"""Running a program that a model wrote: Python in bubblewrap, with nothing to see, nothing to write and little to use.

The program finds Python's standard library, read-only, and no other file of the machine; no network, no other process,
no environment, no place to write. Memory, CPU time, processes and output are limited, and everything ends with the
time limit or with the caller. Started by root, it runs as the user ``nobody``, without which the limit of processes
would not hold.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from r1mega.config import ConfigError
from r1mega.rl.rewards.definition import RewardFailure

_NOBODY = "65534"
_MOST_OUTPUT = 1 << 20  # bytes; a program that writes more is killed
_MOST_PROCESSES = 32
_TOOLS = ("bwrap", "setpriv", "prlimit")
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin")
_INSIDE = "/program.py"
_PROBE_SECONDS = 20.0


@dataclass(frozen=True)
class Result:
    """How a program ended.

    Args:
        status: exit status; negative is the number of a signal.
        output: what it wrote to its standard output.
    """

    status: int
    output: bytes


def check_sandbox() -> None:
    """Run a trivial program. Raises :class:`ConfigError` of one line where bubblewrap is missing or does not work."""
    _prefix()


def run_program(source: str, stdin: str | None = None, *, time_limit: float = 5.0, memory_limit: int = 512) -> Result:
    """Run Python source in the sandbox.

    Args:
        source: of the program.
        stdin: what it reads. None: nothing, and the program itself is not in any file that it could read.
        time_limit: seconds.
        memory_limit: MiB of address space of each process.

    Raises :class:`~r1mega.rl.rewards.definition.RewardFailure` where the program does not end in time, and
    :class:`ConfigError` where there is no sandbox.
    """
    return _run(_prefix(), source, stdin, time_limit, memory_limit)


def _run(prefix: tuple[str, ...], source: str, stdin: str | None, time_limit: float, memory_limit: int) -> Result:
    output = os.memfd_create("output")
    program = os.memfd_create("program")
    try:
        os.write(program, source.encode(errors="replace") if stdin is not None else b"")
        os.lseek(program, 0, os.SEEK_SET)
        limits = [
            f"--as={memory_limit << 20}",
            f"--cpu={int(time_limit) + 1}",
            f"--nproc={_MOST_PROCESSES}",
            f"--fsize={_MOST_OUTPUT}",
            "--nofile=64",
            "--core=0",
        ]
        script = "-" if stdin is None else _INSIDE
        head, tail = prefix[: prefix.index("--")], prefix[prefix.index("--") + 1 :]
        inside = [*tail, "prlimit", *limits, _python(), "-I", "-S", "-B", script]
        command = [*head, "--file", str(program), _INSIDE, "--remount-ro", "/", "--", *inside]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            pass_fds=(program,),
            cwd="/",
        )
        try:
            process.communicate((source if stdin is None else stdin).encode(errors="replace"), time_limit)
        except subprocess.TimeoutExpired as error:
            raise RewardFailure("program took too long: and was killed") from error
        finally:
            process.kill()
            process.wait()
        return Result(process.returncode, os.pread(output, _MOST_OUTPUT, 0))
    finally:
        os.close(output)
        os.close(program)


@functools.cache
def _prefix() -> tuple[str, ...]:
    """The command that makes the sandbox on this machine, found by trying; ``--`` stands before what runs inside."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        packages = {"bwrap": "bubblewrap", "setpriv": "util-linux", "prlimit": "util-linux"}
        raise ConfigError(
            f"rewards.names=code: runs programs that a model wrote, and needs {missing[0]} for that; install "
            f"{packages[missing[0]]} (apt-get install {packages[missing[0]]}), or leave the reward out"
        )
    for prefix in _candidates():
        try:
            result = _run(prefix, "print(6 * 7)", "", _PROBE_SECONDS, 512)
        except RewardFailure:
            continue
        if result == Result(0, b"42\n"):
            return prefix
    raise ConfigError(
        "rewards.names=code: bubblewrap cannot make a sandbox on this machine; allow user namespaces (sysctl "
        "kernel.unprivileged_userns_clone, user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns), "
        "or leave the reward out"
    )


def _candidates() -> list[tuple[str, ...]]:
    bwrap = shutil.which("bwrap") or "bwrap"
    read_only = [argument for path in _folders() for argument in _mount(path)]
    world = ("--die-with-parent", "--new-session", "--clearenv", *read_only, "--dev", "/dev", "--remount-ro", "/dev")
    unprivileged = (bwrap, "--unshare-all", *world, "--chdir", "/", "--")
    if os.getuid() != 0:
        return [unprivileged]
    drop = ("setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups")
    # Root's own Python may lie where nobody can look, as in /root: then what root makes is left by setpriv inside.
    namespaces = ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
    powers = [argument for name in ("SETUID", "SETGID", "SETPCAP") for argument in ("--cap-add", f"CAP_{name}")]
    inside = (*drop, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
    return [
        (*drop, *unprivileged),
        (bwrap, *namespaces, "--cap-drop", "ALL", *powers, *world, "--chdir", "/", "--", *inside),
    ]


def _mount(path: str) -> list[str]:
    """Arguments that show ``path``; the folders above it, which are empty besides, are for everybody to pass."""
    parents = [str(parent) for parent in reversed(Path(path).parents) if str(parent) != "/"]
    return [*(word for parent in parents for word in ("--perms", "0755", "--dir", parent)), "--ro-bind", path, path]


def _folders() -> list[str]:
    """The folders that Python needs."""
    prefix = str(Path(sys.base_prefix).resolve())
    found = [path for path in _SYSTEM_FOLDERS if os.path.exists(path)]
    return found if prefix == "/usr" or prefix.startswith("/usr/") else [*found, prefix]


def _python() -> str:
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))
