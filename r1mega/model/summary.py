"""How many parameters a model has, by component, counted on the model itself built on the meta device."""

from __future__ import annotations

import re
from dataclasses import dataclass

from r1mega.config import ModelConfig

COMPONENTS = (
    "embedding",
    "attention",
    "dense feed-forward",
    "router",
    "routed experts",
    "shared experts",
    "norms",
    "head",
    "MTP",
)
# Where in a layer a parameter stands; the norms inside the attention count as attention.
_IN_LAYER = (
    (r"\.self_attn\.", "attention"),
    (r"\.mlp\.experts\.", "routed experts"),
    (r"\.mlp\.shared_experts\.", "shared experts"),
    (r"\.mlp\.gate\.", "router"),
    (r"\.mlp\.", "dense feed-forward"),
    (r"norm\.weight$", "norms"),
)


@dataclass
class Count:
    """Parameters of a component: all of them, and those that one token is multiplied with (its active ones)."""

    total: int = 0
    active: int = 0


def component_of(name: str) -> str:
    """The component that the parameter ``name`` belongs to, one of :data:`COMPONENTS`."""
    if name.startswith("mtp."):
        return "MTP"
    if name == "embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    return next(component for pattern, component in _IN_LAYER if re.search(pattern, name))


def parameter_counts(config: ModelConfig) -> dict[str, Count]:
    """Parameters by component, and the sums ``main`` (without MTP) and ``MTP``.

    The active parameters are those that take part in a product with each token: of the routed experts the chosen ones;
    of the embedding, which is looked up, none; the head, tied or not, all. The score bias of a router counts as a
    parameter, as in DeepSeek's own figures.
    """
    import torch
    import torch.distributed as dist

    from r1mega.model.blocks import list_blocks
    from r1mega.model.huggingface import named_tensors
    from r1mega.model.stage import build_stage
    from r1mega.parallel_state import ParallelState

    had_processes = dist.is_initialized()
    state = ParallelState.single_process()
    stage = build_stage(config, state, list_blocks(config, length=1), torch.float32, "meta")
    counts = {component: Count() for component in COMPONENTS}
    for name, parameter in named_tensors(stage).items():
        number, count = parameter.numel(), counts[component_of(name)]
        count.total += number
        if ".mlp.experts." in name:
            count.active += number * config.moe.top_k // config.moe.num_experts
        elif name != "embed_tokens.weight":
            count.active += number
    if config.tie_embeddings:
        counts["head"].active += counts["embedding"].total
    if not had_processes:
        dist.destroy_process_group()
    parts = [count for component, count in counts.items() if component != "MTP"]
    counts["main"] = Count(sum(part.total for part in parts), sum(part.active for part in parts))
    return counts


def parameter_table(config: ModelConfig) -> str:
    """The counts as a table with a line for each component that the model has, and the sums below."""
    counts = parameter_counts(config)
    main, mtp = counts.pop("main"), counts.pop("MTP")
    rows = [(name, count) for name, count in counts.items() if count.total or count.active]
    lines = [f"{'component':<20}{'parameters':>20}{'active per token':>20}"]
    lines += [f"{name:<20}{count.total:>20,}{count.active:>20,}" for name, count in rows]
    if mtp.total:
        lines.append(f"{'MTP layers':<20}{mtp.total:>20,}{mtp.active:>20,}")
    width = max(len(f"{main.total:,}"), 1)
    lines += ["", f"main model            {main.total:>{width},}", f"active with the head  {main.active:>{width},}"]
    if mtp.total:
        lines.append(f"MTP's own             {mtp.total:>{width},}")
    return "\n".join(lines)
