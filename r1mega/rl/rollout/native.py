"""Generation inside the training processes: the same weights, in the same layout, with a cache.

A replica's rows are cut into groups, as many as the pipeline has stages. Each group takes turns: it reads new prompts,
or all its rows go one token further. In round r, stage s runs the turn of group g at time ``r * groups + g + s``: while
one group's tokens are drawn on the last stage, the others are on the way through the stages before. All ranks of the
replica keep the same books (``rows``), so nobody has to say what a turn consists of; hidden states go from stage to
stage, and drawn tokens from the last stage to all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from r1mega.collectives import all_gather
from r1mega.config import ModelConfig
from r1mega.kernels.parameter import local
from r1mega.kernels.policy_tile import multiply
from r1mega.kernels.scratch import Scratch
from r1mega.model.decoder import DecoderLayer
from r1mega.model.stage import Stage
from r1mega.moe.replay import ExpertRecord
from r1mega.parallel_state import ParallelState
from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import StageOutput
from r1mega.rl.rollout.engine import Completion, OnFinished, Request, Sampling
from r1mega.rl.rollout.links import Agreement, Links
from r1mega.rl.rollout.rows import Layers, Rows, Turn, Waiting
from r1mega.rl.rollout.sampler import draw, uniforms
from r1mega.tensor_parallel.collectives import gather_tokens
from r1mega.tensor_parallel.layers import Linear
from r1mega.train.sharding import gather, reshard


@dataclass(frozen=True)
class Report:
    """What a call of :meth:`NativeEngine.generate` did.

    Args:
        tokens: drawn for this replica.
        seconds: of wall clock.
        passes: forward passes of a group through each stage.
    """

    tokens: int
    seconds: float
    passes: int

    @property
    def tokens_per_second(self) -> float:
        """Of this replica."""
        return self.tokens / self.seconds if self.seconds else 0.0


class NativeEngine:
    """The rollout engine inside the training processes. Building it is a collective call.

    Args:
        stages: this rank's stages by number in ``table``.
        table: of the training; says where the stages are. Of two copies of the model the first one is used.
        state: the layout's groups.
        config: the model.
        dtype: of the computation (``train.dtype``).
        num_ids: the tokenizer's size; the model may have rows beyond, which are never drawn.
        max_rows: completions that a replica generates at once, at most (rounded up for tensor parallelism).
        with_experts: record the experts of each token.
        absorbs: MLA keeps its latents alone and absorbs the projections from them. Otherwise it keeps keys and values:
            for DeepSeek-V3 71 times the memory, but in bfloat16 the log-probabilities are exactly training's, where
            lengths are multiples of 16 there; absorbed, they differ by what other roundings do.

    Raises:
        ValueError: the model drops tokens over capacity. Which ones depends on the tokens that come later in the
            sequence, so that it cannot be generated one by one.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        table: Table,
        state: ParallelState,
        config: ModelConfig,
        dtype: torch.dtype,
        num_ids: int,
        max_rows: int = 256,
        with_experts: bool = True,
        absorbs: bool = True,
    ) -> None:
        if config.moe.num_experts and (config.moe.capacity_factor is not None or config.moe.force_balance):
            raise ValueError("a model with moe.capacity_factor or moe.force_balance cannot generate token by token")
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: must be 1 or more")
        self.stage_to_rank = table.stage_to_rank[: table.stages_per_copy]
        self.state, self.config, self.dtype = state, config, dtype
        self.num_ids, self.max_rows = num_ids, max_rows
        self.stages: dict[int, Stage] = {}
        for number in sorted(stages):
            stage = stages[number]
            assert isinstance(stage, Stage)
            if number < len(self.stage_to_rank):
                self.stages[number] = stage
        self._all_stages = list(stages.values())
        self._layers = self._find_layers(with_experts, absorbs)
        self._links = Links(state, self.stage_to_rank)
        self._agreement = Agreement(state)
        self._scratch = Scratch()
        self.report = Report(0, 0.0, 0)

    def sync_weights(self) -> None:
        """Nothing to do: the weights are the training's own."""

    def close(self) -> None:
        """Nothing to do: the engine has no process of its own."""

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Completion]:
        """See :class:`r1mega.rl.rollout.engine.RolloutEngine`. :attr:`report` says how fast it was."""
        started = time.perf_counter()
        order = self._check(requests)
        found: list[Completion] = []

        def finish(completion: Completion) -> None:
            found.append(completion)
            if on_finished is not None:
                on_finished(completion)

        groups = self._groups(requests, sampling)
        with self._gathered():
            passes = self._run(groups, sampling, finish)
        num_tokens = sum(len(completion.tokens) for completion in found)
        self.report = Report(num_tokens, time.perf_counter() - started, passes)
        return sorted(found, key=lambda completion: (order[completion.key], completion.sample))

    def _check(self, requests: Sequence[Request]) -> dict[int, int]:
        """The place of each request by its key. Raises ValueError."""
        for request in requests:
            if not request.prompt or request.num_samples < 1:
                raise ValueError(f"request {request.key}: needs a token in its prompt and a sample at least")
            if not 0 <= min(request.prompt) <= max(request.prompt) < self.config.vocab_size:
                raise ValueError(f"request {request.key}: ids must be between 0 and {self.config.vocab_size - 1}")
        order = {request.key: place for place, request in enumerate(requests)}
        if len(order) < len(requests):
            raise ValueError("two requests have the same key")
        return order

    def _groups(self, requests: Sequence[Request], sampling: Sampling) -> list[Rows]:
        """As many groups as stages, each for its share of the rows and, where it can, for whole requests."""
        num_groups = len(self.stage_to_rank)
        most = max(1, self.max_rows // num_groups)
        samples = [request.num_samples for request in requests]
        fill = min(most, -(-sum(samples) // num_groups))
        num_rows = min(most, fill + max(samples, default=1) - 1)
        waiting = Waiting(iter(requests))
        state = self.state
        return [
            Rows(num_rows, fill, waiting, sampling, self._layers, state.group("tp"), state.device)
            for _ in range(num_groups)
        ]

    def _run(self, groups: list[Rows], sampling: Sampling, finish: Callable[[Completion], None]) -> int:
        """Run turns until nobody has rows left; the number of turns."""
        first_stage, last_stage = min(self.stages), max(self.stages)
        turns: list[Turn | None] = [None] * len(groups)
        clock, end, num_turns = 0, None, 0
        while end is None or clock - last_stage < end * len(groups):
            for number in self.stages:
                round, place = divmod(clock - number, len(groups))
                if round < 0:
                    continue
                if number == first_stage and end is None:
                    if place == 0 and not self._agreement.goes_on(round, any(map(_has_rows, turns))):
                        end = round
                    else:
                        turns[place] = self._next_turn(groups[place], turns[place], finish)
                        num_turns += 1
                turn = turns[place]
                if turn is not None and (end is None or round < end):
                    self._run_stage(number, groups[place], turn, sampling)
            clock += 1
        self._links.release(0)
        return num_turns

    def _next_turn(self, rows: Rows, before: Turn | None, finish: Callable[[Completion], None]) -> Turn | None:
        """End the turn before, which the last stage has drawn tokens for, and begin the next."""
        if before is not None and _has_rows(before) and len(self.stage_to_rank) - 1 not in self.stages:
            rows.take(before, *self._links.receive_drawn(before.rows.stop - before.rows.start))
        left, turn = rows.next_turn()
        for completion in left:
            finish(completion)
        if turn is None and self._agreement.is_needed:
            turn = rows.empty_turn()
        return turn

    def _run_stage(self, number: int, rows: Rows, turn: Turn, sampling: Sampling) -> None:
        stage, batch = self.stages[number], turn.batch
        is_last = number == len(self.stage_to_rank) - 1
        activations: tuple[Tensor, ...] = ()
        if number > 0:
            shape = turn.num_tokens // self.state.size("tp"), self.config.hidden_size
            if _has_rows(turn):
                activations = (self._links.receive_hidden(number, shape, self.dtype),)
            else:
                activations = (torch.empty(shape, dtype=self.dtype, device=self.state.device),)
        if self._layers.routed:
            batch.experts = ExpertRecord()
        if is_last:
            batch.head = _Head(rows, turn, sampling, self.num_ids, self._scratch)
        output = stage(activations, batch)
        if not _has_rows(turn):
            return
        if batch.experts is not None:
            rows.record(turn, batch.experts)
        if is_last:
            drawn = output.metrics["tokens"], output.metrics["log_probs"]
            self._links.send_drawn(*drawn)
            rows.take(turn, *drawn)
        else:
            self._links.send_hidden(number, output.activations[0])
        # Those of two rounds ago have surely been taken: their group has come back to this rank since.
        self._links.release(2 * len(self.stage_to_rank) * (len(self.stages) + self.state.size("pp")))

    def _find_layers(self, with_experts: bool, absorbs: bool) -> Layers:
        cached = sorted(int(index) for stage in self.stages.values() for index in stage.layers)
        routed = [index for index in cached if self.config.is_moe_layer(index)] if with_experts else None
        width = 0
        for stage in self.stages.values():
            for layer in stage.layers.values():
                assert isinstance(layer, DecoderLayer)
                width = layer.self_attn.entry_width(absorbs)
        return Layers(cached, width, routed, self.config.moe.top_k, self.dtype, absorbs)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Data-parallel shards are gathered once, by all ranks at the same place, and freed in the end."""
        for stage in self.stages.values():
            gather(stage)
        yield
        for stage in self.stages.values():
            reshard(stage)


class _Head:
    """What the last stage does with hidden states in a turn: draw the next token of each row.

    The tensor-parallel ranks gather the vocabulary and all draw, each from the same numbers.
    """

    def __init__(self, rows: Rows, turn: Turn, sampling: Sampling, num_ids: int, scratch: Scratch) -> None:
        self.rows, self.turn, self.sampling, self.num_ids, self.scratch = rows, turn, sampling, num_ids, scratch

    def __call__(self, hidden: Tensor, lm_head: Linear, group: ProcessGroup) -> StageOutput:
        turn = self.turn
        if not _has_rows(turn):
            return StageOutput()
        hidden = gather_tokens(hidden, group)
        hidden = hidden[turn.rows] if turn.ends is None else hidden.index_select(0, turn.ends)
        weight = local(lm_head.weight)
        # as wide as in the loss, so that half-precision logits are not rounded in one and whole in the other
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.promote_types(hidden.dtype, torch.float32))
        multiply(hidden, weight, logits)
        if group.size() > 1:
            parts = all_gather(logits, group).unflatten(0, (group.size(), -1))
            logits = parts.transpose(0, 1).flatten(1)
        if turn.prompts is not None:
            logits = logits.index_select(0, turn.prompts)
        numbers = uniforms(self.rows.streams[turn.rows], self.rows.drawn[turn.rows])
        tokens, log_probs = draw(logits, numbers, self.sampling, self.num_ids, self.scratch)
        return StageOutput(metrics={"tokens": tokens, "log_probs": log_probs})


def _has_rows(turn: Turn | None) -> bool:
    return turn is not None and turn.rows.stop > turn.rows.start
