"""The rows that are generated together: which completion each one is, how far it is, and when it leaves.

Every rank of a model replica keeps its own copy of this and changes it in the same way, from the same tokens; only
the cache and the expert choices differ, which are those of the rank's own layers.

Shapes: R rows that there is memory for, of which the first n are in use; b prompts; K experts a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from r1mega.data.batch import Batch
from r1mega.model.cache import Cache, DecodeStep, PromptStep
from r1mega.moe.replay import NO_RECORD, ExpertRecord
from r1mega.rl.rollout.engine import Completion, Request, Sampling
from r1mega.rl.rollout.sampler import stream

LEAVE_TOGETHER = 16  # rows that have ended leave once they are one of so many
PROMPT_TOKENS = 1 << 15  # read at once, unless one prompt is longer


class Waiting:
    """Requests that have not begun, in order."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = deque(requests)
        self._first_sample = 0  # of the first request

    @property
    def next_length(self) -> int:
        """Tokens of the next prompt; 0 where none is waiting."""
        return len(self._requests[0].prompt) if self._requests else 0

    def take(self, most: int, whole: bool) -> tuple[Request, range] | None:
        """The next request and its samples, ``most`` at most; with ``whole`` all of them, or None."""
        if not self._requests or most <= 0:
            return None
        request = self._requests[0]
        samples = range(self._first_sample, min(request.num_samples, self._first_sample + most))
        if samples.stop < request.num_samples:
            if whole:
                return None
            self._first_sample = samples.stop
        else:
            self._requests.popleft()
            self._first_sample = 0
        return request, samples


@dataclass(frozen=True)
class Layers:
    """What this rank keeps of a token.

    Args:
        cached: global indices of its decoder layers.
        entry_width: numbers of a cache entry.
        routed: its layers whose experts are recorded; None records none.
        top_k: K.
        dtype: of the cache.
        absorbs: what MLA keeps (``r1mega.model.cache``).
    """

    cached: list[int]
    entry_width: int
    routed: list[int] | None
    top_k: int
    dtype: torch.dtype
    absorbs: bool


@dataclass
class Turn:
    """One forward pass of a group of rows.

    Args:
        batch: what the stages get.
        rows: those that get a token by it.
        ends: ``[b]`` int64, the tokens whose hidden states tell what comes next; None: the first tokens of the batch.
        prompts: ``[rows]`` int64, which of ``ends`` each row goes on from; None: each from its own.
    """

    batch: Batch
    rows: slice
    ends: Tensor | None = None
    prompts: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Those that run through the model, with padding."""
        return self.batch.tokens.numel()


class Rows:
    """A group of rows.

    Args:
        num_rows: R.
        fill: prompts begin while fewer rows than this are in use.
        waiting: prompts that have not begun, which all groups of this rank share.
        sampling: longest length, seed and stop ids.
        layers: of this rank.
        group: the tensor-parallel group, over which the tokens of a forward pass are cut.
        device: where tensors live.
    """

    def __init__(
        self,
        num_rows: int,
        fill: int,
        waiting: Waiting,
        sampling: Sampling,
        layers: Layers,
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        num_rows += -num_rows % group.size()
        self.num_rows, self.fill, self._waiting = num_rows, fill, waiting
        self._sampling, self._layers, self._group, self._device = sampling, layers, group, device
        self._rows: list[tuple[Request, int]] = []
        self._length = 0  # one more than the greatest position that is fed next
        self._numbers = torch.zeros(5, num_rows, dtype=torch.int64, device=device)
        # Whether the row goes on, 1 or 0; how many tokens were drawn; position of the token that is fed next, the last
        # one drawn; that token; stream of the row's random numbers.
        self._going, self.drawn, self._positions, self._last, self.streams = self._numbers.unbind()
        # One column more: there goes what is drawn for a row that has ended and not left.
        self._tokens = torch.zeros(num_rows, sampling.max_tokens + 1, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(self._tokens.shape, dtype=torch.float32, device=device)
        self._first_columns = torch.arange(num_rows, device=device) * self._tokens.shape[1]
        self._stop = torch.tensor(sampling.stop, dtype=torch.int64, device=device)
        self._cache = Cache(layers.cached, num_rows, layers.entry_width, layers.dtype, device, layers.absorbs)
        self._routed = layers.routed or []
        width = len(self._routed) * layers.top_k
        self._experts = torch.zeros(num_rows, 0, width, dtype=torch.int16, device=device)

    def next_turn(self) -> tuple[list[Completion], Turn | None]:
        """Completions that leave, and the next forward pass: of new prompts if there is room, else one token more.

        No turn where there is nothing to do.
        """
        left = self._leave()
        admitted = self._admit()
        if admitted:
            return left, self._read(admitted)
        return left, self._decode() if self._rows else None

    def empty_turn(self) -> Turn:
        """A forward pass without a token, which only takes part in the messages of the others."""
        return self._decode()

    def take(self, turn: Turn, tokens: Tensor, log_probs: Tensor) -> None:
        """Keep what was drawn: ``[rows]`` int64 and their log-probabilities."""
        rows = turn.rows
        places = self._first_columns[rows] + self.drawn[rows]
        self._tokens.view(-1).index_copy_(0, places, tokens)
        self._log_probs.view(-1).index_copy_(0, places, log_probs.to(torch.float32))
        self._last[rows] = tokens
        going = self._going[rows]
        self._numbers[1:3, rows] += going
        ended = self.drawn[rows] >= self._sampling.max_tokens
        if len(self._stop):
            ended |= self._is_stop(tokens)
        going.masked_fill_(ended, 0)
        if turn.prompts is None:
            self._length += 1

    def record(self, turn: Turn, experts: ExpertRecord) -> None:
        """Keep the choices of a forward pass through some of the layers."""
        layers = [layer for layer in self._routed if layer in experts.choices]
        if not layers:
            return
        chosen = torch.cat([experts.choices[layer] for layer in layers], dim=1)
        first_column = self._routed.index(layers[0]) * self._layers.top_k
        columns = slice(first_column, first_column + chosen.shape[1])
        first = self._group.rank() * chosen.shape[0]
        mine = slice(first, first + chosen.shape[0])
        if turn.ends is None:
            rows = torch.arange(mine.start, mine.stop, device=self._device)
            self._experts[rows, self._positions[mine], columns] = chosen
            return
        # What other tensor-parallel ranks chose is not known here: it is put together when a row leaves, and there must
        # be nothing in the place of padding, where a rank will record the choices of a token to come.
        assert turn.prompts is not None
        tokens = chosen.new_full((turn.num_tokens, chosen.shape[1]), NO_RECORD)
        tokens[mine] = chosen
        num_prompts, length = turn.batch.tokens.shape
        is_padding = torch.arange(turn.num_tokens, device=self._device).view(num_prompts, length) > turn.ends[:, None]
        of_prompts = tokens.view(num_prompts, length, -1).masked_fill_(is_padding.unsqueeze(2), NO_RECORD)
        self._experts[turn.rows, :length, columns] = of_prompts.index_select(0, turn.prompts)

    def _admit(self) -> list[tuple[Request, range]]:
        admitted: list[tuple[Request, range]] = []
        num_rows, longest = len(self._rows), 0
        while num_rows < self.fill:
            longest = max(longest, self._waiting.next_length)
            if admitted and (len(admitted) + 1) * longest > PROMPT_TOKENS:
                break
            taken = self._waiting.take(self.num_rows - num_rows, whole=num_rows > 0)
            if taken is None:
                break
            admitted.append(taken)
            num_rows += len(taken[1])
        return admitted

    def _read(self, admitted: list[tuple[Request, range]]) -> Turn:
        first_row = len(self._rows)
        lengths, prompts, numbers = [], [], []
        for index, (request, samples) in enumerate(admitted):
            length = len(request.prompt)
            lengths.append(length)
            for sample in samples:
                self._rows.append((request, sample))
                prompts.append(index)
                numbers.append([1, 0, length - 1, 0, stream(self._sampling.seed, request.key, sample)])
        rows = slice(first_row, len(self._rows))
        self._numbers[:, rows] = torch.tensor(numbers, device=self._device).t()
        longest = self._cache.aligned(max(lengths))
        longest += -longest % self._group.size()
        padded = [request.prompt + [0] * (longest - len(request.prompt)) for request, _ in admitted]
        tokens, of_rows, ends = (torch.tensor(value, device=self._device) for value in (padded, prompts, lengths))
        step = PromptStep(self._cache, longest, of_rows, first_row)
        self._grow_experts()
        self._experts[rows] = NO_RECORD
        self._length = max(self._length, max(lengths) + 1)
        ends = ends + torch.arange(len(lengths), device=self._device) * longest - 1
        return Turn(self._batch(tokens, step), rows, ends, of_rows)

    def _decode(self) -> Turn:
        num_rows = len(self._rows)
        padded = num_rows + -num_rows % self._group.size()
        step = DecodeStep(self._cache, self._positions[:padded], self._length)
        self._grow_experts()
        return Turn(self._batch(self._last[:padded].unsqueeze(1), step), slice(0, num_rows))

    def _batch(self, tokens: Tensor, step: PromptStep | DecodeStep) -> Batch:
        return Batch(tokens, None, None, num_loss_tokens=1, num_sequences=1, cache=step)

    def _grow_experts(self) -> None:
        missing = self._cache.length - self._experts.shape[1]
        if missing > 0:
            added = self._experts.new_full((self.num_rows, missing, self._experts.shape[2]), NO_RECORD)
            self._experts = torch.cat([self._experts, added], dim=1)

    def _leave(self) -> list[Completion]:
        """Completions of the rows that have ended, if they are enough; the last rows in use move to their places."""
        num_rows = len(self._rows)
        num_ended = num_rows - int(self._going[:num_rows].sum())
        if num_ended == 0 or num_ended * LEAVE_TOGETHER < num_rows:
            return []
        going = self._going[:num_rows].tolist()
        ended = [row for row in range(num_rows) if not going[row]]
        completions = self._completions(ended)
        num_left = num_rows - len(ended)
        holes = [row for row in ended if row < num_left]
        movers = [row for row in range(num_left, num_rows) if going[row]]
        for hole, mover in zip(holes, movers, strict=True):
            self._rows[hole] = self._rows[mover]
        del self._rows[num_left:]
        if holes:
            self._move(*(torch.tensor(rows, device=self._device) for rows in (movers, holes)))
        self._length = int(self._positions[:num_left].max()) + 1 if num_left else 0
        return completions

    def _move(self, source: Tensor, destination: Tensor) -> None:
        self._cache.move(source, destination, self._length)
        self._numbers[:, destination] = self._numbers[:, source]
        for tensor in (self._tokens, self._log_probs, self._experts):
            tensor[destination] = tensor[source]

    def _completions(self, ended: list[int]) -> list[Completion]:
        rows = torch.tensor(ended, device=self._device)
        drawn, tokens = self.drawn[rows].tolist(), self._tokens[rows].tolist()
        stopped = self._is_stop(self._last_of(rows)).tolist()
        log_probs, experts = self._log_probs[rows].cpu(), self._experts_of(rows)
        found = []
        for place, row in enumerate(ended):
            request, sample = self._rows[row]
            n = drawn[place]
            num_fed = len(request.prompt) + n - 1
            of_row = None
            if self._layers.routed is not None:
                of_row = {layer: choices[place, :num_fed].clone() for layer, choices in experts.items()}
            ids, probabilities = tokens[place][:n], log_probs[place, :n].clone()
            found.append(Completion(request.key, sample, request.prompt, ids, probabilities, stopped[place], of_row))
        return found

    def _last_of(self, rows: Tensor) -> Tensor:
        return self._tokens[rows].gather(1, self.drawn[rows].unsqueeze(1) - 1).squeeze(1)

    def _experts_of(self, rows: Tensor) -> dict[int, Tensor]:
        """``[rows, positions, K]`` by layer: what all tensor-parallel ranks have recorded of these rows."""
        if not self._routed:
            return {}
        experts = self._experts[rows]
        if self._group.size() > 1:
            experts = experts.to(torch.int32)  # gloo does not know 16 bits
            dist.all_reduce(experts, op=dist.ReduceOp.MAX, group=self._group)
        parts = experts.to(torch.int16).cpu().split(self._layers.top_k, dim=2)
        return dict(zip(self._routed, parts, strict=True))

    def _is_stop(self, tokens: Tensor) -> Tensor:
        if len(self._stop) == 1:
            return tokens == self._stop
        return torch.isin(tokens, self._stop)
