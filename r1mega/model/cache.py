"""What decoding keeps of the tokens it has seen: one entry a token and layer, and how attention reaches it.

An entry is what the kind of attention needs of an old token, side by side: keys and values of grouped-query attention;
of MLA the compressed latent and the rotated shared key, where the projections of keys and values are absorbed in those
of queries and results, or else its keys and values, too. Attention is handed one of two views (``Sequences.cache``):
:class:`PromptStep` while prompts are read (attention is the training forward's, and its entries are kept for each
completion of the prompt), :class:`DecodeStep` when each row goes one token further.

Shapes: R rows, S positions, W numbers of an entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r1mega.kernels.scratch import Scratch
from r1mega.model.rope import RotaryTable

GROWTH = 64  # positions
# Lengths in bfloat16: the CPU's attention rounds otherwise what stands after the last multiple of this.
ALIGNMENT = 16


class Cache:
    """Entries of some layers, ``[layers, R, S, W]``; S grows as it is needed.

    Args:
        layers: global indices.
        num_rows: R.
        width: W.
        dtype: of the entries.
        device: where they are.
        absorbs: what MLA keeps.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        absorbs: bool = True,
    ) -> None:
        self.absorbs = absorbs
        self._places = {layer: place for place, layer in enumerate(layers)}
        self.scratch = Scratch()
        self.entries = torch.zeros(len(layers), num_rows, 0, width, dtype=dtype, device=device)

    @property
    def length(self) -> int:
        """Positions for which there is memory."""
        return self.entries.shape[2]

    def reserve(self, length: int) -> None:
        """Make room for positions up to ``length``, a half more than there was at least."""
        if length > self.length:
            num_layers, num_rows, before, width = self.entries.shape
            wanted = max(length, before * 3 // 2)
            grown = self.entries.new_zeros(num_layers, num_rows, -(-wanted // GROWTH) * GROWTH, width)
            grown[:, :, :before] = self.entries
            self.entries = grown

    def aligned(self, length: int) -> int:
        """``length`` or a little more, so that attention rounds as in training, whose lengths are aligned, too."""
        return length + -length % ALIGNMENT if self.entries.dtype.itemsize < 4 else length

    def layer(self, layer: int) -> Tensor:
        """``[R, S, W]`` of the layer with this global index."""
        return self.entries[self._places[layer]]

    def move(self, source: Tensor, destination: Tensor, length: int) -> None:
        """Copy the first ``length`` positions of rows ``source`` to rows ``destination``, which are no sources."""
        self.entries[:, destination, :length] = self.entries[:, source, :length]


class PromptStep:
    """Prompts are read; what is kept of each goes to one or more rows.

    Args:
        cache: of the layers.
        length: of the prompts with their padding, which stands on the right.
        prompts: ``[n]`` int64, which prompt each of n rows gets.
        first_row: the first of these rows.
    """

    def __init__(self, cache: Cache, length: int, prompts: Tensor, first_row: int) -> None:
        cache.reserve(length)
        self._cache, self._length, self._prompts = cache, length, prompts
        self.absorbs = cache.absorbs
        self._rows = slice(first_row, first_row + prompts.shape[0])

    def keep(self, layer: int, entries_TW: Tensor) -> None:
        """Entries ``[T, W]`` of all tokens of the prompts."""
        entries = entries_TW.unflatten(0, (-1, self._length))
        self._cache.layer(layer)[self._rows, : self._length] = entries.index_select(0, self._prompts)


class DecodeStep:
    """Each of the first R rows goes one token further.

    Args:
        cache: of the layers.
        positions: ``[R]`` int64, of the new tokens.
        length: one more than the greatest position.
    """

    def __init__(self, cache: Cache, positions: Tensor, length: int) -> None:
        length = cache.aligned(length)
        cache.reserve(length)
        self._cache, self._positions, self._length = cache, positions, length
        self.num_rows, self.scratch, self.absorbs = positions.shape[0], cache.scratch, cache.absorbs
        self._places = torch.arange(self.num_rows, device=positions.device) * cache.length + positions
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}
        unseen = torch.arange(length, device=positions.device) > positions.unsqueeze(1)
        self.mask = torch.zeros(unseen.shape, dtype=cache.entries.dtype, device=positions.device)
        self.mask.masked_fill_(unseen, -torch.inf)
        """``[R, S]``, to be added to the scores."""

    def add(self, layer: int, entries_RW: Tensor) -> Tensor:
        """Keep the new tokens' entries; returns those of all tokens of the rows, ``[R, S, W]``."""
        entries = self._cache.layer(layer)
        entries.view(-1, entries.shape[2]).index_copy_(0, self._places, entries_RW)
        return entries[: self.num_rows, : self._length]

    def rotation(self, rotary: RotaryTable, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the new tokens' positions, each ``[R, dim / 2]``; the same for all layers of a model."""
        if rotary.dim not in self._rotations:
            cos, sin = rotary(self._cache.length, dtype, self._positions.device)
            self._rotations[rotary.dim] = cos.index_select(0, self._positions), sin.index_select(0, self._positions)
        return self._rotations[rotary.dim]
