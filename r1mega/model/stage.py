"""One pipeline stage of the model: the blocks placed on it, run in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.config import ModelConfig
from r1mega.data.batch import Batch
from r1mega.model.decoder import DecoderLayer, MTPLayer
from r1mega.model.sequences import Sequences
from r1mega.moe.replay import ExpertRecord
from r1mega.parallel_state import ParallelState
from r1mega.pipeline.exchange import Steps, at_once, keeping
from r1mega.pipeline.executor import StageOutput
from r1mega.pipeline.partition import Block
from r1mega.tensor_parallel.collectives import gather_tokens, reduce_scatter_tokens
from r1mega.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from r1mega.tensor_parallel.layers import Embedding, Linear, RMSNorm


class Stage(nn.Module):
    """The blocks of one stage. Parameter names are global: they do not depend on the cut.

    Between stages travels ``(hidden,)`` with ``hidden [T / tp, H]``; after the last decoder layer it is normalised, and
    each MTP layer adds a tensor of the same shape behind it.

    Args:
        config: the model.
        state: the process groups.
        blocks: what stands on this stage, in order.
        dtype: of the parameters.
        device: of the parameters.
    """

    can_step = True

    def __init__(
        self, config: ModelConfig, state: ParallelState, blocks: Sequence[Block], dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        self.config, self.group = config, state.group("tp")
        placed = {kind: [block.index for block in blocks if block.kind == kind] for kind in "EtmL"}
        self.is_first, self.is_last = bool(placed["E"]), bool(placed["L"])
        needs_embedding = self.is_first or bool(placed["m"]) or (self.is_last and config.tie_embeddings)
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(vocab, hidden, state, dtype, device) if needs_embedding else None
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, i, state, dtype, device) for i in placed["t"]})
        has_norm = config.num_layers - 1 in placed["t"]
        self.norm = RMSNorm(hidden, config.norm_eps, dtype, device) if has_norm else None
        self.mtp = nn.ModuleDict({str(i): MTPLayer(config, i, state, dtype, device) for i in placed["m"]})
        self.lm_head = Linear(hidden, vocab, state, "column", dtype=dtype, device=device) if self.is_last else None
        self.value_head = None
        if self.is_last and config.value_head:
            self.value_head = Linear(hidden, 1, state, None, dtype=dtype, device=device)
        if self.lm_head is not None and self.embed_tokens is not None and config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, activations: tuple[Tensor, ...], batch: Batch, stepwise: bool = False
    ) -> StageOutput | Steps[StageOutput]:
        """Run one microbatch; ``stepwise`` returns it as steps (:mod:`r1mega.pipeline.exchange`).

        The last stage predicts ``batch.labels``. Where there are none it calls ``batch.head``, and where there is no
        head either it returns ``metrics["logits"]``, ``[tokens, vocabulary]``.
        """
        steps = self._steps(activations, batch)
        if stepwise:
            return steps
        output, router_losses = at_once(steps)
        output.losses = (*router_losses, *output.losses)
        return output

    def _steps(self, activations: tuple[Tensor, ...], batch: Batch) -> Steps[StageOutput]:
        losses: dict[str, list[Tensor]] = defaultdict(list)
        streams = yield from self._run_blocks(activations, batch, losses)
        metrics = {name: torch.stack(values).sum() for name, values in losses.items()}
        if batch.experts is not None:
            metrics |= self._agreement(batch.experts)
        if self.is_last and batch.labels is None:
            if batch.head is None:
                return StageOutput(metrics=metrics | {"logits": self._logits(streams[0])})
            output = batch.head(streams[0], self.lm_head, self.group)
            output.metrics |= metrics
            return output
        if not self.is_last:
            return StageOutput(streams, (), metrics)
        main, *ahead = (self._prediction_loss(hidden, depth, batch) for depth, hidden in enumerate(streams))
        metrics |= self._prediction_metrics(main, ahead)
        mtp_losses = (loss * (self.config.mtp_loss_coefficient / len(ahead)) for loss in ahead)
        return StageOutput((), (main, *mtp_losses), metrics)

    def _run_blocks(
        self, activations: tuple[Tensor, ...], batch: Batch, losses: dict[str, list[Tensor]]
    ) -> Steps[tuple[Tensor, ...]]:
        """Everything but the head; what the stage hands on. Router losses are added to ``losses``, detached."""
        sequences = Sequences.of(batch)
        streams = (self._embed(batch.tokens),) if self.is_first else activations
        for layer in self.layers.values():
            hidden, layer_losses = yield from layer(streams[0], sequences)
            streams = (hidden,)
            _collect(losses, layer_losses)
        if self.norm is not None:
            streams = (self.norm(streams[0]),)
        if batch.labels is None:
            return streams
        if streams is activations and not self.is_last:
            # Handed on as they came: FSDP watches over what a module returns, and must not find its very input there.
            streams = tuple(stream.clone() for stream in streams)
        for index, layer in self.mtp.items():
            embedded = self._embed(_ahead(batch.labels, int(index)))
            steps = layer(streams[-1], embedded, sequences)
            (hidden, layer_losses), streams = yield from keeping(steps, *streams)
            streams = (*streams, hidden)
            _collect(losses, layer_losses)
        return streams

    def _agreement(self, experts: ExpertRecord) -> dict[str, Tensor]:
        """``[2]`` by router: repeated choices that the live router made as well, and all. They add up over ranks."""
        return {f"layers.{i}.mlp.gate": experts.agreement[int(i)] for i in self.layers if int(i) in experts.agreement}

    def _embed(self, ids: Tensor) -> Tensor:
        assert self.embed_tokens is not None
        return reduce_scatter_tokens(self.embed_tokens(ids.flatten()), self.group)

    def _prediction_loss(self, hidden: Tensor, depth: int, batch: Batch) -> Tensor:
        """Mean over the tokens of the whole global batch, for MTP layers too (DeepSeek-V3, equation 24)."""
        assert self.lm_head is not None and batch.labels is not None and batch.loss_mask is not None
        labels, mask = _ahead(batch.labels, depth), _ahead(batch.loss_mask, depth) & batch.loss_mask
        logits = self.lm_head(gather_tokens(hidden, self.group))
        loss = vocab_parallel_cross_entropy(logits, labels.flatten(), self.group)
        return (loss * mask.flatten()).sum() / batch.num_loss_tokens

    def _prediction_metrics(self, main: Tensor, ahead: list[Tensor]) -> dict[str, Tensor]:
        """``loss``, and ``mtp_loss`` as the mean over MTP layers.

        The tensor-parallel ranks hold the same values, so one of them reports and the others add zero.
        """
        found = {"loss": main.detach()}
        if ahead:
            found["mtp_loss"] = torch.stack(ahead).mean().detach()
        return found if self.group.rank() == 0 else {name: torch.zeros_like(value) for name, value in found.items()}

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self.lm_head is not None
        logits = self.lm_head(gather_tokens(hidden, self.group))
        if self.group.size() == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self.group.size())]
        dist.all_gather(parts, logits.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)


def _ahead(values: Tensor, steps: int) -> Tensor:
    """``[b, s]`` shifted left by ``steps``; what runs in from the right is zero (or False)."""
    if steps == 0:
        return values
    return torch.cat([values[:, steps:], torch.zeros_like(values[:, :steps])], dim=1)


def _collect(losses: dict[str, list[Tensor]], more: dict[str, Tensor]) -> None:
    for name, loss in more.items():
        losses[name].append(loss.detach())


def build_stage(
    config: ModelConfig,
    state: ParallelState,
    blocks: Sequence[Block],
    dtype: torch.dtype = torch.float32,
    device: str = "meta",
) -> Stage:
    """Build the blocks of one stage; on ``meta`` nothing is allocated. See :class:`Stage`."""
    return Stage(config, state, blocks, dtype, device)
