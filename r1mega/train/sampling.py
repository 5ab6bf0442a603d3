"""A text sampled from the model, by whole forward passes through the pipeline: to look at, not to serve."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from r1mega.data.batch import Batch
from r1mega.data.tokenizer import Tokenizer
from r1mega.parallel_state import ParallelState
from r1mega.pipeline.actions import Action, Kind, Table
from r1mega.pipeline.executor import PipelineExecutor
from r1mega.pipeline.schedules import with_reductions

TEMPERATURE = 0.7


def sample_text(
    stages: Mapping[int, nn.Module],
    table: Table,
    state: ParallelState,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    max_length: int,
    seed: int,
) -> str:
    """Continue ``prompt`` by up to ``num_tokens`` tokens; the text without the prompt. A collective call.

    The executor takes over the stages' weight-gradient stores, so this comes after the training.

    Args:
        stages: this rank's stages by number.
        table: of the training; says where the stages are.
        state: the layout's groups.
        tokenizer: of the model.
        prompt: the beginning.
        num_tokens: how many tokens to add at most; an end-of-document token ends the text.
        max_length: of prompt and text together.
        seed: decides the samples.
    """
    table = _one_microbatch(table)
    mine = {number: stages[number] for number in table.stages_of(state.rank_in("pp"))}
    executor = PipelineExecutor(table, mine, state.group("pp") if state.size("pp") > 1 else None)
    chooser = state.layout.groups("pp")[0][table.stage_to_rank[-1]]
    generator = torch.Generator().manual_seed(seed)
    tokens = (tokenizer.encode(prompt, bos=True) or [tokenizer.eos_id])[-max_length:]
    start = len(tokens)
    for _ in range(min(num_tokens, max_length - start)):
        metrics = executor.run([_batch(tokens, state)], forward_only=True)
        token = _choose(metrics.get("logits"), len(tokens) - 1, tokenizer.vocab_size, generator, state, chooser)
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[start:])


def _one_microbatch(table: Table) -> Table:
    """One microbatch through the stages of the first copy of the model."""
    stage_to_rank = table.stage_to_rank[: table.stages_per_copy]
    rows: list[list[Action]] = [[] for _ in range(table.num_ranks)]
    for kind in (Kind.F, Kind.B):
        for stage, rank in sorted(enumerate(stage_to_rank), reverse=kind is Kind.B):
            rows[rank].append(Action(kind, stage, 0))
    return Table(stage_to_rank, with_reductions(rows))


def _batch(tokens: list[int], state: ParallelState) -> Batch:
    """One sequence, padded so that tensor parallelism can cut it; causal attention never looks at the padding."""
    padded = tokens + [0] * (-len(tokens) % state.size("tp"))
    return Batch(torch.tensor([padded], device=state.device), None, None, num_loss_tokens=1, num_sequences=1)


def _choose(
    logits: Tensor | None,
    position: int,
    vocab_size: int,
    generator: torch.Generator,
    state: ParallelState,
    chooser: int,
) -> int:
    """Draw the next token on the rank ``chooser``, which holds the last stage and tells all others."""
    token = torch.zeros(1, dtype=torch.int64)
    if state.rank == chooser:
        assert logits is not None, "the last stage computes the logits"
        probabilities = torch.softmax(logits[position, :vocab_size].double().cpu() / TEMPERATURE, dim=-1)
        token = torch.multinomial(probabilities, 1, generator=generator)
    token = token.to(state.device)
    dist.broadcast(token, src=chooser)
    return int(token.item())
