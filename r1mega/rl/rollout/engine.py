"""What a rollout engine takes and gives: prompts in; tokens, log-probabilities and expert choices out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Request:
    """A prompt to be completed.

    Args:
        prompt: token ids, one at least.
        key: says which prompt this is, for the random numbers and for the caller. It must not depend on the layout:
            the index of the prompt in the step's global batch will do.
        num_samples: completions that are wanted.
    """

    prompt: list[int]
    key: int
    num_samples: int = 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: draw from the smallest set of most probable tokens whose probabilities sum to this at least.
        max_tokens: longest completion, in tokens.
        seed: of the random numbers; another one in each step of a training.
        stop: ids that end a completion; the one that did is its last token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 128
    seed: int = 0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for is_good, name, what_fits in (
            (self.temperature >= 0, "temperature", "must be 0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", "must be more than 0 and at most 1"),
            (self.max_tokens >= 1, "max_tokens", "must be 1 or more"),
        ):
            if not is_good:
                raise ValueError(f"{name}={getattr(self, name)}: {what_fits}")


@dataclass
class Completion:
    """One completion of a prompt.

    Args:
        key: of the request.
        sample: which of the request's completions, from 0.
        prompt: of the request.
        tokens: n ids, the one that stopped it included.
        log_probs: ``[n]`` float32 on the CPU, of the tokens under the tempered distribution over the whole vocabulary,
            before ``top_p`` cuts it (with temperature 0: under the distribution of temperature 1).
        finished: whether it ended with a stop id; otherwise it was cut off at the longest length.
        experts: by global layer, ``[len(prompt) + n - 1, K]`` int16 on the CPU, the experts of every token that was fed
            to the model, in the MoE layers of this rank; None where they were not asked for.
    """

    key: int
    sample: int
    prompt: list[int]
    tokens: list[int]
    log_probs: Tensor
    finished: bool
    experts: dict[int, Tensor] | None = None


OnFinished = Callable[[Completion], None]


class RolloutEngine(Protocol):
    """Completes prompts with the weights that are being trained."""

    def sync_weights(self) -> None:
        """Take over the present weights. A collective call."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Completion]:
        """Complete prompts; a collective call.

        Args:
            requests: of this data-parallel rank, in the same order on all ranks of its model replica; may be empty.
            sampling: the same everywhere.
            on_finished: called with each completion as it ends, in the same order on all ranks of the replica.

        Returns:
            All completions, ordered by request and sample.
        """

    def close(self) -> None:
        """End what the engine has started."""
