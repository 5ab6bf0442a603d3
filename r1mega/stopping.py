"""How a rank ends that others have lost: one line for the whole job, which names the rank that died first.

torchrun sees within a tenth of a second that a process has gone, ends all others with SIGTERM, and names in its own
report the one that it has seen first. So a rank that loses a peer waits for that signal before it goes, and whichever
rank is first to know says it. The ranks of a machine find each other in the folder that torchrun makes for their error
files, which is there before torch is imported. Where the launcher of the examples has started the job
(:mod:`r1mega.launch`), it says who died, and the ranks are silent. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

LAUNCHED = "R1MEGA_LAUNCHED"  # set by r1mega.launch
STATUS_TERMINATED = 128 + signal.SIGTERM
STATUS_INTERRUPTED = 128 + signal.SIGINT
SECONDS_FOR_TORCHRUN = 15.0
SECONDS_TO_TIDY_UP = 10.0
_SAID = "said"

_speaking = threading.Lock()


def watch() -> None:
    """Make SIGTERM explain itself, in a process that torchrun has started; as early as can be.

    A thread does it, because the main one may be waiting for the rank that died. Twice is as good as once. Ctrl-C ends
    the process without a traceback of the imports, until :func:`accept_interrupts`.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    folder = _folder()
    if folder is None or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return
    (folder / f"rank_{os.environ['RANK']}").write_text(str(os.getpid()))
    waiting, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.signal(signal.SIGTERM, lambda *_: _end(wait=False))
    signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    threading.Thread(target=_wait, args=(waiting,), name="r1mega-stopping", daemon=True).start()


def accept_interrupts() -> None:
    """Let Ctrl-C be a KeyboardInterrupt again, now that somebody is there to catch it."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def say(text: str, *, known_to_launcher: bool = False) -> None:
    """Print the reason why the job ends, unless another rank of this machine has already given one.

    Args:
        text: one line.
        known_to_launcher: a process has ended, which a launcher sees for itself.
    """
    with _speaking:
        _say(text, known_to_launcher)


def _say(text: str, known_to_launcher: bool) -> None:
    if (known_to_launcher and LAUNCHED in os.environ) or not _claim():
        return
    print(f"r1mega: error: {text}", file=sys.stderr, flush=True)
    if not known_to_launcher:
        _tell_torchrun(text)


def wait_for_torchrun() -> None:
    """Give torchrun the time to see who died; its signal ends this process."""
    if _folder() is not None:
        time.sleep(SECONDS_FOR_TORCHRUN)


def is_alive(pid: int) -> bool:
    """Whether process ``pid`` runs; one that has ended but is not yet reaped by its parent does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return state not in ("Z", "X")


def died(ranks: dict[int, int]) -> str:
    """``ranks``, with the id of each one's process, as the line names them."""
    return ", ".join(f"rank {rank} (process {pid})" for rank, pid in ranks.items()) + " died"


def _folder() -> Path | None:
    """The folder that the ranks of this machine share: torchrun keeps an error file for each rank below it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(file).parent.parent if file and "RANK" in os.environ else None
    return folder if folder is not None and folder.is_dir() else None


def _claim() -> bool:
    """Whether this process is the first to speak. Without a common folder each one speaks for itself."""
    folder = _folder()
    if folder is None:
        return True
    try:
        os.close(os.open(folder / _SAID, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def _tell_torchrun(text: str) -> None:
    """Put the reason into torchrun's report, which otherwise has a link to a manual there."""
    if _folder() is None:
        return
    text = f"r1mega: error: {text}"
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    content = json.dumps({"message": {"message": text, "extraInfo": extra}})
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(content)


def _wait(waiting: int) -> None:
    while True:
        numbers = os.read(waiting, 64)
        if signal.SIGTERM in numbers:
            _end(wait=True)
        if signal.SIGINT in numbers:
            # The main thread ends the process, unless it waits inside the system for a rank that has gone.
            time.sleep(SECONDS_TO_TIDY_UP)
            os._exit(STATUS_INTERRUPTED)


def _end(wait: bool) -> None:
    """End this process; say why if nobody has.

    A signal can come while the main thread is about to speak, which goes on after its handler alone. So that does not
    wait: the other thread does, and ends the process then.
    """
    if not _speaking.acquire(blocking=wait):
        return
    if LAUNCHED not in os.environ:
        if dead := _dead_ranks():
            _say(f"rank {os.environ['RANK']} stops: {died(dead)}", known_to_launcher=True)
        elif _claim():
            print("r1mega: stopped", file=sys.stderr, flush=True)
    os._exit(STATUS_TERMINATED)


def _dead_ranks() -> dict[int, int]:
    """Ranks of this machine whose process has ended, with its id."""
    folder, found = _folder(), {}
    for file in sorted(folder.glob("rank_*")) if folder is not None else ():
        pid = file.read_text()
        if pid and not is_alive(int(pid)):
            found[int(file.name.removeprefix("rank_"))] = int(pid)
    return found


def _forget() -> None:
    """In a forked child, which is no rank."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
