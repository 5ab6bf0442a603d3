"""Generation by vLLM: a server of its own, which reads the weights from a folder after each update.

Rank 0 of the world runs one server; the first rank of each model replica sends it the replica's prompts as token ids,
one request a completion, and tells the replica's other ranks what came. So the log-probabilities of a completion are
made by other code than the training's, and after every sync a few of them are compared with those of the training's
forward: vLLM may read weights wrongly, or not at all, and say nothing.

A completion is drawn from a seed of its own, a function of (seed, key, sample). vLLM's logits depend, in their last
bits, on which requests share a batch, so a repeated run gives the same tokens but where a draw falls into that gap.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from r1mega.config import Config, ConfigError, require
from r1mega.model.export import stored_type
from r1mega.model.huggingface_config_writer import huggingface_family
from r1mega.parallel_state import ParallelState
from r1mega.rl.rollout.engine import Completion, OnFinished, Request, Sampling
from r1mega.rl.rollout.sampler import stream
from r1mega.rl.rollout.vllm_check import CHECK, check_requests, greatest_difference, training_log_probs
from r1mega.rl.rollout.vllm_server import Address, Client, Server, VllmError, require_vllm
from r1mega.rl.rollout.weights import WeightFolder
from r1mega.settings import is_first_rank
from r1mega.train.learner import Learner, TrainingError

FOLDER, WEIGHTS, NAME = "vllm", "weights", "policy"
MOST_REQUESTS = 256
_LEAST_LOGIT = -100.0  # what the protocol allows at least
_TOLERANCES = {"bfloat16": 0.2}
_TOLERANCE = 1e-3
_SLACK = 60.0  # seconds that ranks wait for the one that speaks to the server, beyond what that may take

Result = TypeVar("Result")


def check_settings(config: Config) -> None:
    """Check what can be checked before the first weights are written.

    Raises:
        ConfigError: one line, for what vLLM cannot do, or where it is missing.
    """
    rl = config.rl
    huggingface_family(config.model)
    what_fits = (
        "must be 1 with rl.engine vllm and an rl.temperature other than 1: the log-probabilities that it reports would "
        "be those of the cut distribution"
    )
    require(rl.temperature == 1 or rl.top_p == 1, "rl.top_p", rl.top_p, what_fits)
    if is_first_rank() and (wrong := require_vllm(rl.vllm)):
        raise ConfigError(f"rl.vllm.python={rl.vllm.python or 'null'}: {wrong}")


class VllmEngine:
    """The rollout engine that asks a vLLM server. Building it is a collective call; it starts nothing yet.

    ``log_probs`` of completions are NaN where vLLM cannot report them as :class:`Completion` wants: at a temperature
    that is not ``rl.temperature`` (evaluations, which do not look at them).

    Args:
        config: the job.
        state: the layout's groups.
        learner: what is trained.
        num_ids: the tokenizer's size; ids from here on are no tokens, and are kept from being drawn.
    """

    def __init__(self, config: Config, state: ParallelState, learner: Learner, num_ids: int) -> None:
        self._config, self._state, self._learner, self._num_ids = config, state, learner, num_ids
        self._options, rl = config.rl.vllm, config.rl
        self._folder = Path(config.train.output_dir).resolve() / FOLDER
        stages = {n: stage for n, stage in learner.stages.items() if n < learner.table.stages_per_copy}
        self._weights = WeightFolder(config, state, stages, self._folder / WEIGHTS)
        self._server: Server | None = None
        if state.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._server = Server(self._options, self._folder, _host())
        # Ranks wait in it for those that wait for the server, longer than for any message of a training.
        patience = _SLACK + self._options.start_timeout + self._options.request_timeout
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
        self._client: Client | None = None
        self._is_leader = state.rank_in("tp_pp") == 0
        self._with_experts = rl.routing_replay and config.model.moe.num_experts > 0
        self._reports_raw = rl.temperature == 1
        self._num_syncs = 0
        self.difference = 0.0

    def sync_weights(self) -> None:
        """Have the server take over the present weights, where they have changed, and check that it has.

        Raises:
            TrainingError: on all ranks; vLLM does not start, does not answer, or reports other log-probabilities than
                the training's forward.
        """
        if self._num_syncs and not self._weights.has_changed():
            return
        is_reload = self._options.sync == "reload" and self._num_syncs > 0
        if self._server is not None and not is_reload:
            self._server.stop()  # its memory may be wanted for gathering
        self._weights.write()
        address = self._on_first_rank(self._reload if is_reload else self._start)
        if address is not None:
            self._client = Client(address, self._options.request_timeout)
        self._num_syncs += 1
        self._check()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Completion]:
        """See :class:`r1mega.rl.rollout.engine.RolloutEngine`. Raises TrainingError on all ranks."""
        found: list[Completion] = []

        def finish(completion: Completion) -> None:
            found.append(completion)
            if on_finished is not None:
                on_finished(completion)

        failure = None
        if self._is_leader:
            try:
                self._complete(requests, sampling, finish)
            except VllmError as error:
                failure = str(error if self._server is None else self._server.explain(error))
        self._raise_anywhere(failure)
        if self._state.size("tp_pp") > 1:
            box: list[Any] = [found if self._is_leader else None]
            dist.broadcast_object_list(box, src=self._state.ranks("tp_pp")[0], group=self._state.group("tp_pp"))
            if not self._is_leader:
                for completion in box[0]:
                    finish(completion)
        order = {request.key: place for place, request in enumerate(requests)}
        return sorted(found, key=lambda completion: (order[completion.key], completion.sample))

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.stop()

    def _start(self) -> Address:
        assert self._server is not None
        rl = self._config.rl
        arguments = ["--model", str(self._weights.path), "--served-model-name", self._name(self._num_syncs + 1)]
        arguments += ["--dtype", stored_type(self._config), "--generation-config", "vllm", "--seed", "0"]
        arguments += ["--max-model-len", str(rl.max_prompt_tokens + rl.max_new_tokens)]
        arguments += ["--logprobs-mode", "raw_logprobs" if self._reports_raw else "processed_logprobs"]
        if self._with_experts:
            arguments.append("--enable-return-routed-experts")
        return self._server.start(arguments)

    def _reload(self) -> None:
        """The server reads the folder again, and forgets what it has cached of prompts."""
        assert self._client is not None
        self._client.post("/collective_rpc", {"method": "reload_weights"})
        self._client.post("/reset_prefix_cache", {})

    def _name(self, sync: int) -> str:
        """What the model is called: a server that was left over from before a restart does not know the name."""
        return NAME if self._options.sync == "reload" else f"{NAME}-{sync}"

    def _check(self) -> None:
        """Compare log-probabilities of the server with the training's."""
        rl = self._config.rl
        requests = check_requests(self._num_ids, rl.max_prompt_tokens)
        sampling = Sampling(temperature=rl.temperature, max_tokens=min(CHECK.tokens, rl.max_new_tokens))

        def ask() -> list[Completion]:
            found: list[Completion] = []
            self._complete(requests, sampling, found.append)
            return sorted(found, key=lambda completion: completion.key)

        completions = self._on_first_rank(ask)
        ours = training_log_probs(self._learner, self._config, completions)
        self.difference = self._on_first_rank(lambda: greatest_difference(completions, ours))
        tolerance = self._options.tolerance or _TOLERANCES.get(self._config.train.dtype, _TOLERANCE)
        if not self.difference <= tolerance:  # NaN is no agreement
            self.close()
            raise TrainingError(
                f"vLLM does not compute with the weights of the training: after sync {self._num_syncs} "
                f"({self._options.sync}) its log-probabilities differ by {self.difference:.2g}, more than "
                f"rl.vllm.tolerance ({tolerance:g})"
            )

    def _complete(self, requests: Sequence[Request], sampling: Sampling, finish: OnFinished) -> None:
        """Ask for all completions at once; ``finish`` is called with each as it comes. Raises :class:`VllmError`."""
        wanted = [(request, sample) for request in requests for sample in range(request.num_samples)]
        threads = min(len(wanted), self._config.rl.max_rows or MOST_REQUESTS)
        pool = ThreadPoolExecutor(max(1, threads), "vllm")
        try:
            futures = [pool.submit(self._complete_one, request, sample, sampling) for request, sample in wanted]
            for future in as_completed(futures):
                finish(future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete_one(self, request: Request, sample: int, sampling: Sampling) -> Completion:
        assert self._client is not None
        body: dict[str, Any] = {
            "model": self._name(self._num_syncs),
            "prompt": request.prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": stream(sampling.seed, request.key, sample),
            "stop_token_ids": list(sampling.stop),
            "ignore_eos": True,  # only those ids end a completion
            "logprobs": 0,
            "return_token_ids": True,
        }
        if padding := range(self._num_ids, self._config.model.vocab_size):
            body["logit_bias"] = {str(index): _LEAST_LOGIT for index in padding}
        answer = self._client.post("/v1/completions", body)
        try:
            return self._completion(request, sample, sampling, answer["choices"][0])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise VllmError(f"its answer is not what is expected ({type(error).__name__}: {error})") from error

    def _completion(self, request: Request, sample: int, sampling: Sampling, choice: dict[str, Any]) -> Completion:
        tokens, values = list(choice["token_ids"]), choice["logprobs"]["token_logprobs"]
        if not tokens or len(values) != len(tokens) or choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"{len(tokens)} tokens, {len(values)} log-probabilities, {choice['finish_reason']}")
        log_probs = torch.tensor(values, dtype=torch.float32)
        if not self._reports(sampling):
            log_probs.fill_(torch.nan)
        finished = tokens[-1] in sampling.stop
        rows = len(request.prompt) + len(tokens) - 1
        experts = self._experts(choice.get("routed_experts"), rows) if self._with_experts else None
        return Completion(request.key, sample, request.prompt, tokens, log_probs, finished, experts)

    def _reports(self, sampling: Sampling) -> bool:
        """Whether vLLM reports log-probabilities as they are wanted."""
        if self._reports_raw:
            return sampling.temperature in (0, 1)
        return sampling.temperature == self._config.rl.temperature and sampling.top_p == 1

    def _experts(self, encoded: str | None, rows: int) -> dict[int, Tensor]:
        """``[rows, K]`` int16 of each MoE layer; vLLM sends ``[rows, layers, K]`` of all layers as a file of numpy."""
        if encoded is None:
            raise VllmError("it reports no choices of experts; set rl.routing_replay to false")
        choices = numpy.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
        model = self._config.model
        if choices.shape != (rows, model.num_layers, model.moe.top_k):
            raise ValueError(f"choices of experts of shape {choices.shape}")
        whole = torch.from_numpy(choices.astype(numpy.int16))
        return {layer: whole[:, layer].clone() for layer in range(model.num_layers) if model.is_moe_layer(layer)}

    def _on_first_rank(self, work: Callable[[], Result]) -> Result:
        """The result of rank 0, on all ranks. Raises TrainingError on all where it fails."""
        box: list[Any] = [None, None]
        if self._server is not None:
            try:
                box[0] = work()
            except VllmError as error:
                said = str(error)
                box[1] = said if said.startswith("vLLM") else str(self._server.explain(error))
                self._server.stop()
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise TrainingError(box[1])
        return box[0]

    def _raise_anywhere(self, failure: str | None) -> None:
        """Raise on all ranks where any has failed: what rank 0 says, which sees the server, before the others."""
        failures = [failure] * self._state.layout.world_size
        dist.all_gather_object(failures, failure, group=self._group)
        said = [failure for failure in failures if failure is not None]
        if said:
            self.close()
            raise TrainingError(said[0])


def _host() -> str:
    """Where the server listens: on this machine alone, unless the job has others."""
    environment = os.environ
    is_alone = environment.get("LOCAL_WORLD_SIZE", "1") == environment.get("WORLD_SIZE", "1")
    return "127.0.0.1" if is_alone else environment["MASTER_ADDR"]
