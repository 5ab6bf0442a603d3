"""Expert parallelism for a Hugging Face model: r1mega's dispatcher and kernels inside transformers' Qwen3-MoE blocks.

    torchrun --nproc-per-node 2 examples/huggingface_qwen3_moe.py
    torchrun --nproc-per-node 4 examples/huggingface_qwen3_moe.py --experts 16 --top_k 4

transformers keeps its model and its router; only ``block.experts`` is replaced, by a module of the same call that holds
this rank's share of the experts and sends tokens to the others. Each rank has its own part of the batch. First the
outputs and all gradients are compared with those of the untouched model in one process, then a few steps of training
show that it learns. Set OMP_NUM_THREADS=1, as all ranks share the processor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed where r1mega is installed

from r1mega.kernels.linear import grouped_linear
from r1mega.kernels.swiglu import weighted_swiglu
from r1mega.moe.dispatcher import AllToAllDispatcher, routing_of

ROWS, LENGTH = 4, 32  # of the whole batch


class ParallelExperts(nn.Module):
    """Stands in for ``Qwen3MoeExperts``: as many of its experts as fall to this rank of ``group``.

    Args:
        experts: the module to replace.
        group: ranks that share the experts.
    """

    def __init__(self, experts: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.dispatcher = AllToAllDispatcher(experts.num_experts, group)
        self.num_experts = experts.num_experts
        size = experts.num_experts // group.size()
        mine = slice(group.rank() * size, (group.rank() + 1) * size)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj[mine].detach().clone())
        self.down_proj = nn.Parameter(experts.down_proj[mine].detach().clone())

    def forward(self, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        routing = routing_of(experts_TK, weights_TK.float(), self.num_experts)
        d = self.dispatcher.dispatch(hidden_TH, routing)
        gate_up = grouped_linear(d.rows, self.gate_up_proj, d.counts)
        rows = grouped_linear(weighted_swiglu(gate_up, d.weights), self.down_proj, d.counts)
        return self.dispatcher.combine(rows, d)


def parallelise(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Replace the experts of every block."""
    for layer in model.model.layers:
        layer.mlp.experts = ParallelExperts(layer.mlp.experts, group)


def build(num_experts: int, top_k: int) -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=num_experts, num_experts_per_tok=top_k,
        norm_topk_prob=True, use_cache=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


def batch(step: int) -> Tensor:
    """``[ROWS, LENGTH]``: windows of this file."""
    text = torch.tensor(list(Path(__file__).read_bytes()))
    starts = torch.randint(0, len(text) - LENGTH, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    return text[starts + torch.arange(LENGTH)]


def backward(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of ``tokens``, and the loss: their share of the mean over the whole batch."""
    logits = model(input_ids=tokens).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss = loss / (ROWS * (LENGTH - 1))
    loss.backward()
    return logits.detach(), loss.detach()


def sum_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum over the ranks what each has of the gradient of a parameter that all hold; experts have all of theirs."""
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            dist.all_reduce(parameter.grad, group=group)


def largest_difference(model: nn.Module, group: dist.ProcessGroup, num_experts: int, top_k: int) -> dict[str, float]:
    """Between this rank's logits and gradients and those of the untouched model, relative to the largest value."""
    whole, tokens, share = build(num_experts, top_k), batch(0), ROWS // group.size()
    mine = slice(group.rank() * share, (group.rank() + 1) * share)
    expected, _ = backward(whole, tokens)
    logits, _ = backward(model, tokens[mine])
    sum_gradients(model, group)
    found = {"logits": (logits, expected[mine])}
    originals = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = originals[name].grad
        if ".experts." in name:
            gradient = gradient.chunk(group.size())[group.rank()]
        found[name] = parameter.grad, gradient
    return {name: ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for name, (a, b) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8, help="default %(default)s")
    parser.add_argument("--top_k", type=int, default=2, help="default %(default)s")
    parser.add_argument("--num_steps", type=int, default=20, help="default %(default)s")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    if ROWS % group.size() or arguments.experts % group.size():
        parser.error(f"{ROWS} rows and {arguments.experts} experts cannot be shared by {group.size()} ranks evenly")
    model = build(arguments.experts, arguments.top_k)
    parallelise(model, group)
    differences = largest_difference(model, group, arguments.experts, arguments.top_k)
    worst = torch.tensor(max(differences.values()))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if group.rank() == 0:
        print(
            f"{arguments.experts} experts on {group.size()} ranks; logits and all gradients differ from those of the "
            f"untouched model by {worst.item():.1e} at most"
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    share = ROWS // group.size()
    for step in range(arguments.num_steps):
        optimizer.zero_grad()
        _, loss = backward(model, batch(step)[group.rank() * share :][:share])
        sum_gradients(model, group)
        optimizer.step()
        dist.all_reduce(loss)
        if group.rank() == 0 and (step % 5 == 0 or step == arguments.num_steps - 1):
            print(f"step {step + 1:3}  loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
