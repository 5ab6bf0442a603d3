"""Stands in for vLLM's server: the same flags, the same endpoint, the answers of r1mega's own model.

The environment variable STAND_IN says what goes wrong: ``refuse`` to start, ``die`` or ``hang`` at a completion,
``stale`` weights after a reload, ``no_experts`` reported.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULT = os.environ.get("STAND_IN", "")
DYING = threading.Lock()


class Model:
    """The model in a folder, read when it is first needed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments, self._stage = arguments, None
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Read the folder again."""
        if FAULT != "stale":
            self._stage = None

    def _load(self):
        import torch

        from r1mega.model.blocks import list_blocks
        from r1mega.model.huggingface import load_huggingface, model_config_from
        from r1mega.model.stage import build_stage
        from r1mega.parallel_state import ParallelState

        torch.set_num_threads(1)
        self._config = model_config_from(self._arguments.model)
        blocks = list_blocks(self._config, self._arguments.max_model_len)
        stage = build_stage(self._config, ParallelState.single_process(), blocks, torch.float32, "cpu")
        load_huggingface(stage, self._config, self._arguments.model)
        return stage

    def complete(self, request: dict) -> dict:
        """One choice of the answer."""
        import torch

        with self._lock, torch.no_grad():
            self._stage = self._stage or self._load()
            generator = torch.Generator().manual_seed(request["seed"])
            tokens, log_probs, reason = [], [], "length"
            while len(tokens) < request["max_tokens"]:
                logits, experts = self._forward(request["prompt"] + tokens)
                biased = logits.clone()
                for index, bias in request.get("logit_bias", {}).items():
                    biased[int(index)] += bias
                if request["temperature"] == 0:
                    token = int(biased.argmax())
                else:
                    probabilities = (biased / request["temperature"]).softmax(0)
                    token = int(torch.multinomial(probabilities, 1, generator=generator))
                if self._arguments.logprobs_mode == "processed_logprobs":
                    logits = biased / request["temperature"]
                tokens.append(token)
                log_probs.append(logits.log_softmax(0)[token].item())
                if token in request["stop_token_ids"]:
                    reason = "stop"
                    break
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": log_probs}, "finish_reason": reason}
        if self._arguments.enable_return_routed_experts:
            choice["routed_experts"] = experts
        return choice

    def _forward(self, tokens: list[int]):
        """Logits of the next token; the experts of all that were read, as vLLM writes them."""
        import numpy
        import torch

        from r1mega.data.batch import Batch
        from r1mega.moe.replay import ExpertRecord

        record = ExpertRecord()
        logits = self._stage((), Batch(torch.tensor([tokens]), None, None, 0, 1, experts=record)).metrics["logits"]
        choices = numpy.zeros((len(tokens), self._config.num_layers, self._config.moe.top_k), dtype=numpy.uint8)
        for layer, of_layer in record.choices.items():
            choices[:, layer] = of_layer.numpy()
        file = io.BytesIO()
        numpy.save(file, choices)
        return logits[-1].float(), base64.b64encode(file.getvalue()).decode()


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does."""

    model: Model
    name: str
    body: bytes

    def do_GET(self) -> None:
        self._answer(200, None)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self._answer(401, {"error": "Unauthorized"})
        elif self.path == "/collective_rpc":
            self.model.forget()
            self._answer(200, {"results": []})
        elif self.path == "/reset_prefix_cache":
            self._answer(200, None)
        elif request["model"] != self.name:
            self._answer(404, {"error": {"message": f"The model `{request['model']}` does not exist."}})
        elif FAULT == "die":
            with DYING:
                print("RuntimeError: out of luck", flush=True)
                os._exit(3)
        elif FAULT == "hang":
            time.sleep(60)
        elif FAULT == "no_experts":
            choice = {"token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"}
            self._answer(200, {"choices": [choice]})
        else:
            self._answer(200, {"choices": [self.model.complete(request)]})

    def _answer(self, status: int, body: dict | None) -> None:
        encoded = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        pass


class Threads(ThreadingHTTPServer):
    """A thread a request."""

    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("host", "model", "served-model-name", "dtype", "generation-config", "logprobs-mode"):
        parser.add_argument(f"--{flag}")
    for flag in ("port", "seed", "max-model-len"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--enable-return-routed-experts", action="store_true")
    arguments = parser.parse_args()
    if FAULT == "refuse":
        print("starting")
        print("ERROR 11-20 [core.py] ValueError: the weights are of the wrong colour")
        print("the server says goodbye")
        sys.exit(1)
    leaked = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK") if name in os.environ]
    assert not leaked, f"{leaked} are torchrun's"
    print("listening at port", arguments.port, flush=True)
    Handler.model, Handler.name = Model(arguments), arguments.served_model_name
    Threads((arguments.host, arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
