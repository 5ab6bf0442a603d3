"""The floor of a training step: the matrix products with its weights, alone, on one core, by two libraries.

    python -m benchmarks.matmul_floor --tp 2

prints CPU-seconds per 1,000 tokens, split by part. Every rank's products have the shapes that the layout gives them,
with as many rows for each expert as it gets on average; forward is one product, backward two (the input's gradient,
and the weight's, added to what earlier microbatches left). Each layer has weights of its own, so they come from
memory as in a real step. Nothing else is counted: no attention scores, norm, activation function, permutation,
communication or optimizer. The scores are timed apart, as PyTorch's fused attention. All products are timed as r1mega
makes them on this machine (``r1mega.kernels.products``), and once more by PyTorch's own library, which megatron-core
uses.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Workload, argument_parser, workload_from
from r1mega.kernels.products import add_matmul, matmul


@dataclass(frozen=True)
class Product:
    """``count`` products ``[rows, inputs] x [inputs, outputs]`` of one rank, layer and microbatch."""

    part: str
    count: int
    rows: int
    inputs: int
    outputs: int


def layer_products(workload: Workload, tp: int = 1, ep: int = 1) -> list[Product]:
    """The products of one decoder layer on one rank, for one microbatch of each rank."""
    tokens, hidden, width = workload.sequence_length, workload.hidden_size, workload.expert_width
    # a rank's experts see the tokens of all ep ranks, and of all tp ranks, which hold one microbatch together
    experts, rows = workload.num_experts // ep, ep * tokens * workload.top_k // workload.num_experts
    return [
        Product("attention projections", 1, tokens, hidden, 3 * hidden // tp),
        Product("attention projections", 1, tokens, hidden // tp, hidden),
        Product("router", 1, tokens // tp, hidden, workload.num_experts),
        Product("experts", experts, rows, hidden, 2 * width // tp),
        Product("experts", experts, rows, width // tp, hidden),
    ]


def head_product(workload: Workload, tp: int = 1) -> Product:
    return Product("head", 1, workload.sequence_length, workload.hidden_size, workload.vocab_size // tp)


class Library(NamedTuple):
    """Who multiplies: ``multiply(a, b)``, and ``add(total, a, b)`` in place."""

    multiply: Callable[[Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor, Tensor], Tensor]


R1MEGA, PYTORCH = Library(matmul, add_matmul), Library(torch.mm, torch.Tensor.addmm_)


class _Operands:
    """Tensors of the products of one kind: inputs shared, weights and weight gradients one each."""

    def __init__(self, product: Product) -> None:
        self.x = torch.randn(product.rows, product.inputs)
        self.dy = torch.randn(product.rows, product.outputs)
        self.weights = [torch.randn(product.outputs, product.inputs) for _ in range(product.count)]
        self.gradients = [torch.zeros_like(w) for w in self.weights]

    def forward(self, library: Library) -> None:
        for weight in self.weights:
            library.multiply(self.x, weight.t())

    def backward(self, library: Library) -> None:
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            library.multiply(self.dy, weight)
            library.add(gradient, self.dy.t(), self.x)


def cpu_seconds_of(work: Callable[[], object], num_rounds: int) -> float:
    """Median CPU time of ``work()`` over ``num_rounds`` calls, after one untimed call."""
    work()
    times = []
    for _ in range(num_rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def matmul_floor(workload: Workload, tp: int = 1, ep: int = 1, num_rounds: int = 15) -> dict[str, float]:
    """CPU-seconds per 1,000 tokens, summed over the ranks, of each part's products, and ``total``.

    ``total by PyTorch`` is the same by PyTorch's library. ``attention core`` (scores, softmax and values, forward and
    backward, by ``scaled_dot_product_attention``) is listed beside them and is not in ``total``.
    """
    parts: dict[str, list[_Operands]] = {}
    for product in layer_products(workload, tp, ep) * workload.num_layers + [head_product(workload, tp)]:
        parts.setdefault(product.part, []).append(_Operands(product))
    per_1000_tokens = 1000 * tp / workload.sequence_length

    def forward_and_backward(operands: list[_Operands], library: Library) -> None:
        for each in operands:
            each.forward(library)
        for each in reversed(operands):
            each.backward(library)

    def seconds(operands: list[_Operands], library: Library) -> float:
        return cpu_seconds_of(lambda: forward_and_backward(operands, library), num_rounds) * per_1000_tokens

    floor = {name: seconds(operands, R1MEGA) for name, operands in parts.items()}
    floor["total"] = sum(floor.values())
    floor["total by PyTorch"] = sum(seconds(operands, PYTORCH) for operands in parts.values())
    floor["attention core"] = cpu_seconds_of(_attention_core(workload, tp), num_rounds) * per_1000_tokens
    return floor


def _attention_core(workload: Workload, tp: int) -> Callable[[], None]:
    shape = (1, workload.num_heads // tp, workload.sequence_length, workload.head_dim)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    gradient: Tensor = torch.randn(shape)

    def all_layers() -> None:
        for _ in range(workload.num_layers):
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), gradient)

    return all_layers


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    print(json.dumps(matmul_floor(workload_from(arguments), arguments.tp, arguments.ep)))


if __name__ == "__main__":
    main()
