"""vLLM's server as a process of ours, and what is said to it: start, stop, complete, and why it has failed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.config import VllmConfig
from r1mega.rl.rollout.keeper import Keeper

MODULE = "vllm.entrypoints.openai.api_server"
LOG_FILE = "server.log"
_LOOK = 0.2  # seconds between questions whether the server is ready
_HEALTH_TIMEOUT = 5.0
_DEATH = 2.0  # seconds from the end of a server's connections to its own
_OF_TORCHRUN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|GROUP_WORLD_SIZE|ROLE_NAME|MASTER_.*|TORCHELASTIC_.*"
)
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
_ERROR = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)\b: .*|\S+: error: .*)")


class VllmError(RuntimeError):
    """The server cannot do what it should. The message is one line, fit to be shown to a user as it is."""


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the key that it wants to see."""

    host: str
    port: int
    key: str


class Client:
    """Speaks to a server. Several threads may, each call has a connection of its own.

    Args:
        address: of the server.
        timeout: seconds to wait for an answer.
    """

    def __init__(self, address: Address, timeout: float) -> None:
        self._address, self._timeout = address, timeout

    def is_ready(self) -> bool:
        """Whether the server answers that it is."""
        with contextlib.suppress(VllmError):
            self._ask("GET", "/health", None, _HEALTH_TIMEOUT)
            return True
        return False

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a request, JSON in and out. Raises :class:`VllmError`."""
        answer = self._ask("POST", path, body, self._timeout)
        try:
            return json.loads(answer) if answer else None
        except ValueError as error:
            raise VllmError(f"its answer to {path} is no JSON: {_short(answer)}") from error

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout: float) -> bytes:
        connection = http.client.HTTPConnection(self._address.host, self._address.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self._address.key}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            answer = response.read()
        except TimeoutError as error:
            raise VllmError(f"no answer within {timeout:g} s (rl.vllm.request_timeout)") from error
        except (OSError, http.client.HTTPException) as error:
            raise VllmError(f"the connection to it is lost ({error or type(error).__name__})") from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise VllmError(f"it answers {path} with status {response.status}: {_message(answer)}")
        return answer


class Server:
    """A server that this process starts and stops; it does not outlive it.

    Args:
        options: the settings.
        folder: for its log; it runs there, too.
        host: the address that it listens at.
    """

    def __init__(self, options: VllmConfig, folder: Path, host: str) -> None:
        self._options, self._folder, self._host = options, folder, host
        self._keeper: Keeper | None = None
        self.log = folder / LOG_FILE

    @property
    def is_running(self) -> bool:
        return self._keeper is not None and self._keeper.status() is None

    def start(self, arguments: list[str]) -> Address:
        """Start it anew and wait until it is ready. Raises :class:`VllmError`."""
        self.stop()
        address = Address(self._host, _free_port(self._host), secrets.token_hex(16))
        python = self._options.python or sys.executable
        command = [python, "-m", MODULE, "--host", address.host, "--port", str(address.port), *arguments]
        environment = {k: v for k, v in os.environ.items() if not _OF_TORCHRUN.fullmatch(k)} | _ENVIRONMENT
        environment |= {"VLLM_API_KEY": address.key}
        if self._options.sync == "reload":
            environment["VLLM_SERVER_DEV_MODE"] = "1"  # the call that reloads is there in this mode only
        self._keeper = Keeper([*command, *self._options.arguments], self.log, environment, self._folder)
        client, deadline = Client(address, _HEALTH_TIMEOUT), time.monotonic() + self._options.start_timeout
        while not client.is_ready():
            if (status := self._keeper.status()) is not None:
                raise VllmError(f"vLLM ended at its start (status {status}): {self._last_words()}")
            if time.monotonic() > deadline:
                self.stop()
                limit = f"{self._options.start_timeout:g} s (rl.vllm.start_timeout)"
                raise VllmError(f"vLLM was not ready within {limit}: {self._last_words()}")
            time.sleep(_LOOK)
        return address

    def stop(self) -> None:
        """Kill it, if it runs, and all its processes."""
        if self._keeper is not None:
            self._keeper.stop()
            self._keeper = None

    def explain(self, error: VllmError) -> VllmError:
        """``error`` in one line that says, too, whether the server has died."""
        deadline = time.monotonic() + _DEATH
        while self.is_running and "connection" in str(error) and time.monotonic() < deadline:
            time.sleep(0.05)
        status = None if self._keeper is None else self._keeper.status()
        if status is None:
            return VllmError(f"vLLM's server: {error}; see {self.log}")
        return VllmError(f"vLLM's server has died (status {status}): {self._last_words()}")

    def _last_words(self) -> str:
        """What its log says of the cause: the first error where there is one, else the last line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [found[1] for found in map(_ERROR.search, lines) if found]
        said = errors[0] if errors else lines[-1] if lines else "it said nothing"
        return f"{_short(said.encode())}; see {self.log}"


def require_vllm(options: VllmConfig) -> str | None:
    """What is wrong with ``rl.vllm.python``, in words; None where it has vLLM."""
    program = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([options.python or sys.executable, "-c", program], cwd="/", capture_output=True)
    except OSError as error:
        return f"cannot be run ({error.strerror})"
    return "has no vLLM; name a Python that has" if found.returncode else None


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _message(answer: bytes) -> str:
    """What an answer says of an error, in vLLM's and OpenAI's form or any other."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        values = json.loads(answer)
        return _short(str(values.get("error", values)["message"]).encode())
    return _short(answer)


def _short(text: bytes) -> str:
    return " ".join(text.decode(errors="replace").split())[:300]
