"""Which rank a job was lost to, from what those that are left have noticed."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from r1mega.pipeline.executor import PipelineError
from r1mega.pipeline.shared_memory import GAVE_UP, GONE
from r1mega.train.process_group import Peers


@pytest.mark.parametrize(
    "noticed", ["Connection closed by peer [127.0.0.1]:1", "[Errno 32] Broken pipe", GONE, GAVE_UP]
)
def test_a_rank_whose_connections_end_before_its_process_does_is_named(noticed: str) -> None:
    peers, looks = Peers.__new__(Peers), []  # without a process group
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as dying:
        peers._host, peers._everyone = socket.gethostname(), [(socket.gethostname(), dying.pid)]

        def dead() -> dict[int, int]:
            looks.append(Peers.dead(peers))
            dying.stdin.close()
            return looks[-1]

        peers.dead = dead
        error = PipelineError(f"pipeline rank 1, action 1F0: waited for a message from rank 0: {noticed}")
        assert peers.explain(error) == f"rank 0 (process {dying.pid}) died"
    assert looks[0] == {}


def test_a_mistake_of_this_rank_is_no_lost_peer() -> None:
    peers = Peers.__new__(Peers)
    peers._host, peers._everyone = socket.gethostname(), []
    assert peers.explain(RuntimeError("shapes do not fit")) is None
