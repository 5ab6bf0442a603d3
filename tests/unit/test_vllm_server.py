"""A server that does not outlive who wants it, and settings that vLLM cannot follow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1mega.config import AttentionConfig, Config, ConfigError, ModelConfig, MoEConfig, RLConfig, VllmConfig
from r1mega.rl.rollout.keeper import Keeper
from r1mega.rl.rollout.vllm import check_settings
from r1mega.rl.rollout.vllm_server import Client, Server, VllmError

# Starts another process in a session of its own, says which, and waits.
PARENT = """\
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""
TRAINING = """\
import os, sys, time
from pathlib import Path
from r1mega.rl.rollout.keeper import Keeper
keeper = Keeper([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]), os.environ, Path("/"))
time.sleep(60)
"""


def wait_for_line(log: Path) -> str:
    """What the command has written."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if log.exists() and (text := log.read_text()).endswith("\n"):
            return text
        time.sleep(0.02)
    raise AssertionError("the command said nothing")


def ends(process: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to the keeper")
def test_stop_kills_what_the_command_has_started_in_other_sessions_too(tmp_path):
    keeper = Keeper([sys.executable, "-c", PARENT], tmp_path / "log", os.environ, tmp_path)
    grandchild = int(wait_for_line(tmp_path / "log"))
    assert keeper.status() is None
    keeper.stop()
    assert ends(grandchild)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives orphans to the keeper")
def test_nothing_is_left_of_the_command_when_the_training_is_killed(tmp_path):
    log = tmp_path / "log"
    training = subprocess.Popen([sys.executable, "-c", TRAINING, PARENT, str(log)])
    grandchild = int(wait_for_line(log))
    training.send_signal(signal.SIGKILL)
    training.wait()
    assert ends(grandchild)


def test_the_status_of_a_command_that_has_ended_or_was_killed(tmp_path):
    for program, status in (("import sys; sys.exit(5)", 5), ("import os; os.kill(os.getpid(), 9)", -9)):
        keeper = Keeper([sys.executable, "-c", program], tmp_path / "log", os.environ, tmp_path)
        deadline = time.monotonic() + 30
        while keeper.status() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert keeper.status() == status
        keeper.stop()


def test_a_server_that_is_not_ready_in_time_is_killed_and_said_so(tmp_path, monkeypatch):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\necho reading the weights\nexec sleep 60\n")
    slow.chmod(0o755)
    server = Server(VllmConfig(python=str(slow), start_timeout=0.1), tmp_path, "127.0.0.1")
    is_ready = Client.is_ready

    def asked_when_it_has_spoken(client: Client) -> bool:
        wait_for_line(server.log)
        return is_ready(client)

    monkeypatch.setattr(Client, "is_ready", asked_when_it_has_spoken)
    with pytest.raises(VllmError) as caught:
        server.start([])
    assert str(caught.value) == (
        "vLLM was not ready within 0.1 s (rl.vllm.start_timeout): reading the weights; see " + str(server.log)
    )
    assert not server.is_running


def config(rl: RLConfig, model: ModelConfig | None = None) -> Config:
    return Config(model=model or ModelConfig(), rl=rl)


def test_a_python_without_vllm_is_an_error_that_names_the_setting(tmp_path):
    missing, without = tmp_path / "python", tmp_path / "without"
    without.write_text("#!/bin/sh\nexit 1\n")
    without.chmod(0o755)
    with pytest.raises(ConfigError, match=r"^rl.vllm.python=.*python: cannot be run \(No such file or directory\)$"):
        check_settings(config(RLConfig(vllm=VllmConfig(python=str(missing)))))
    with pytest.raises(ConfigError, match=r"^rl.vllm.python=.*without: has no vLLM; name a Python that has$"):
        check_settings(config(RLConfig(vllm=VllmConfig(python=str(without)))))


def test_a_cut_distribution_at_another_temperature_is_refused():
    with pytest.raises(ConfigError, match=r"^rl.top_p=0.9: must be 1 with rl.engine vllm and an rl.temperature other"):
        check_settings(config(RLConfig(temperature=0.7, top_p=0.9)))


def test_a_model_that_no_architecture_of_vllm_has_is_refused():
    attention = AttentionConfig(kind="gqa", num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True)
    with pytest.raises(ConfigError, match="no Hugging Face architecture has it"):
        check_settings(config(RLConfig(), ModelConfig(attention=attention, moe=MoEConfig(num_experts=0))))
