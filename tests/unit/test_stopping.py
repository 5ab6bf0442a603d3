"""How the ranks of a machine agree on one line, without torch and without a process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega import stopping
from r1mega.stopping import LAUNCHED, say

ROOT = Path(__file__).parents[2]


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that torchrun makes for the ranks of a machine; this process is rank 1."""
    for rank in range(4):
        (tmp_path / str(rank)).mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1/error.json"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(LAUNCHED, raising=False)
    return tmp_path


def test_the_first_reason_is_said_and_others_are_not(attempt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say("the cause")
    say("a consequence")
    assert capsys.readouterr().err == "r1mega: error: the cause\n"


def test_torchrun_is_told_the_reason_in_its_own_form(attempt: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    say("the cause")
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(attempt / "1/error.json"))
    assert failure.message["message"] == "r1mega: error: the cause"
    assert json.loads((attempt / "1/error.json").read_text())["message"]["extraInfo"]["py_callstack"]


def test_without_torchrun_every_process_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    say("one")
    say("two")
    assert capsys.readouterr().err == "r1mega: error: one\nr1mega: error: two\n"


def test_what_a_launcher_sees_is_left_to_it(
    attempt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LAUNCHED, "1")
    say("rank 0 died", known_to_launcher=True)
    assert capsys.readouterr().err == ""
    say("the disk is full")
    assert capsys.readouterr().err == "r1mega: error: the disk is full\n"


def test_only_ranks_whose_process_has_ended_are_dead(attempt: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (attempt / "rank_0").write_text(str(os.getpid()))
    (attempt / "rank_2").write_text(str(ended.pid))
    (attempt / "rank_3").write_text("")
    assert stopping._dead_ranks() == {2: ended.pid}


WATCHING = """
import os, sys, time
from r1mega.stopping import watch
watch()
if sys.argv[1] == "fork" and os.fork() == 0:
    os.kill(os.getpid(), 15)
    time.sleep(60)
print("ready", flush=True)
time.sleep(1 if sys.argv[1] == "fork" else 60)
"""


def watching(what: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHING, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_signal_of_torchrun_is_explained_by_the_rank_that_has_gone(attempt: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (attempt / "rank_3").write_text(str(ended.pid))
    process = watching("")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == f"r1mega: error: rank 1 stops: rank 3 (process {ended.pid}) died\n"
    assert process.returncode == 143


def test_a_signal_without_a_death_is_a_stop(attempt: Path) -> None:
    process = watching("")
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "r1mega: stopped\n"


STOPPED_WHILE_IT_SPEAKS = """
import os, time
from r1mega import stopping
stopping.watch()
claim = stopping._claim
def claim_and_be_stopped():
    stopping._claim = claim
    claimed = claim()
    os.kill(os.getpid(), 15)
    return claimed
stopping._claim = claim_and_be_stopped
stopping.say("the cause")
time.sleep(60)
"""


def test_a_signal_that_comes_while_the_reason_is_said_waits_for_it(attempt: Path) -> None:
    command = [sys.executable, "-c", STOPPED_WHILE_IT_SPEAKS]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (143, "r1mega: error: the cause\n")
    assert "the cause" in (attempt / "1/error.json").read_text()


def test_a_forked_child_ends_alone(attempt: Path) -> None:
    process = watching("fork")
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0
