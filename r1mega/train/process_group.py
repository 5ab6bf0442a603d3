"""Starting the process group, and saying clearly which process a job was lost to."""

from __future__ import annotations

import os
import re
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from r1mega.pipeline.shared_memory import GAVE_UP, GONE
from r1mega.stopping import died, is_alive

# A live rank answers within seconds; this bounds the wait for one that hangs.
TIMEOUT = timedelta(minutes=10)
SECONDS_TO_DIE = 2.0
LOST_PEER = re.compile(
    "closed by peer|reset by peer|broken pipe|connection refused|timed out|timeout"  # gloo
    "|remote process exited|unhandled system error"  # NCCL
    f"|{GONE}|{GAVE_UP}",  # shared memory
    re.IGNORECASE,
)


def start_process_group() -> torch.device:
    """Join the other processes that torchrun has started, or make a world of one. NCCL with a GPU, gloo without.

    Returns:
        The device of this rank.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    # gloo stays at hand on a GPU, too: checkpoints are written from the CPU.
    backend, device_id = ("gloo", None) if device.type == "cpu" else ("cpu:gloo,cuda:nccl", device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device_id)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device_id)
    return device


class Peers:
    """Who the other ranks are, to name the one that died. Building it is a collective call."""

    def __init__(self) -> None:
        mine = (socket.gethostname(), os.getpid())
        everyone: list[tuple[str, int]] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self._host, self._everyone = mine[0], everyone

    def explain(self, error: BaseException) -> str | None:
        """One line on the peer that ``error`` comes from; None where no lost peer is the cause."""
        lost = LOST_PEER.search(str(error)) is not None
        deadline = time.monotonic() + (SECONDS_TO_DIE if lost else 0.0)
        # A process that ends closes its connections a moment before it is seen to have ended.
        while not (dead := self.dead()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if dead:
            return died(dead)
        return f"another rank was lost: {_one_line(error)}" if lost else None

    def dead(self) -> dict[int, int]:
        """The ranks on this machine whose process has ended, with its id."""
        mine = ((rank, pid) for rank, (host, pid) in enumerate(self._everyone) if host == self._host)
        return {rank: pid for rank, pid in mine if not is_alive(pid)}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
