"""What the layers of a stage must know of a microbatch besides its hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from r1mega.model.cache import DecodeStep, PromptStep
from r1mega.moe.replay import ExpertRecord

if TYPE_CHECKING:
    from r1mega.data.batch import Batch


@dataclass
class Sequences:
    """How the tokens of a microbatch are cut into sequences, and what is known about them.

    Args:
        length: tokens of a row.
        num_sequences: sequences of the whole global batch, the normaliser of the routers' losses.
        packed: lengths of the sequences that stand one behind the other in a row; None where a row is one sequence.
        counted: ``[b, s]`` bool, the tokens that count in the load of the experts (no padding); None counts all.
        experts: choices of experts to keep or to repeat.
        cache: where generation keeps what attention needs of a token; None in training.
    """

    length: int
    num_sequences: int
    packed: list[int] | None = None
    counted: Tensor | None = None
    experts: ExpertRecord | None = None
    cache: PromptStep | DecodeStep | None = None

    @classmethod
    def of(cls, batch: Batch) -> Sequences:
        """Those of ``batch``."""
        return cls(batch.tokens.shape[1], batch.num_sequences, batch.packed, batch.counted, batch.experts, batch.cache)
