"""What a model is made of, as blocks that a pipeline cut can place, and what each costs. Pure arithmetic."""

from __future__ import annotations

from r1mega.config import ModelConfig, ParallelConfig
from r1mega.pipeline.partition import Block, parse_placement, partition


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of one layer's attention, with its inner norms."""
    a, hidden = config.attention, config.hidden_size
    if a.kind == "gqa":
        q_width, kv_width = a.num_heads * config.head_dim, a.kv_heads * config.head_dim
        extra = (q_width + 2 * kv_width) * a.qkv_bias + 2 * config.head_dim * a.qk_norm
        return hidden * (2 * q_width + 2 * kv_width) + extra
    q_width = a.num_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    query = hidden * q_width
    if a.q_lora_rank is not None:
        query = hidden * a.q_lora_rank + a.q_lora_rank + a.q_lora_rank * q_width
    key_value = hidden * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
    key_value += a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return query + key_value + a.num_heads * a.v_head_dim * hidden


def layer_cost(config: ModelConfig, layer: int, length: int) -> float:
    """Multiply-adds of one token in the forward of decoder layer ``layer``: active weights and attention scores."""
    a, hidden = config.attention, config.hidden_size
    qk_dim, v_dim = config.head_dim, config.head_dim
    if a.kind == "mla":
        qk_dim, v_dim = a.qk_nope_head_dim + a.qk_rope_head_dim, a.v_head_dim
    scores = a.num_heads * (qk_dim + v_dim) * length / 2
    if config.is_moe_layer(layer):
        moe = config.moe
        width = (moe.top_k + moe.num_shared_experts) * moe.ffn_hidden_size
        return attention_parameters(config) + scores + 3 * hidden * width + hidden * moe.num_experts
    return attention_parameters(config) + scores + 3 * hidden * config.ffn_hidden_size


def list_blocks(config: ModelConfig, length: int) -> list[Block]:
    """All blocks in order: embedding, decoder layers, MTP layers, head; cost in multiply-adds a token.

    Args:
        config: the model.
        length: tokens of a sequence, which decides the cost of attention.
    """
    hidden = config.hidden_size
    blocks = [Block("E", 0, 0.0)]
    blocks += [Block("t", i, layer_cost(config, i, length)) for i in range(config.num_layers)]
    for i in range(config.num_mtp_layers):
        blocks.append(Block("m", i, layer_cost(config, config.num_layers + i, length) + 2 * hidden * hidden))
    return [*blocks, Block("L", 0, float(hidden * config.vocab_size * (1 + config.num_mtp_layers)))]


def place_blocks(config: ModelConfig, parallel: ParallelConfig, length: int, num_stages: int) -> list[list[Block]]:
    """The blocks of each stage: as ``parallel.placement`` says, or cut by cost."""
    return cut(list_blocks(config, length), parallel, num_stages)


def cut(blocks: list[Block], parallel: ParallelConfig, num_stages: int) -> list[list[Block]]:
    """:func:`place_blocks` for blocks that are listed already."""
    if parallel.placement is not None:
        return parse_placement(parallel.placement, blocks, num_stages)
    return partition(blocks, num_stages)


def stages_with_embedding(config: ModelConfig, stages: list[list[Block]]) -> list[int]:
    """Stages that hold a copy of the embedding table: the embedding's, each MTP layer's, and a tied head's."""
    kinds = {"E", "m"} | ({"L"} if config.tie_embeddings else set())
    return [index for index, blocks in enumerate(stages) if any(block.kind in kinds for block in blocks)]
