"""megatron-core's MoE layer alone on a CPU, forward and backward; prints its times as JSON.

    python -m benchmarks.peers.megatron_moe_layer --tokens 4096 --hidden 512 --experts 32 --top_k 4 --width 512

Softmax router, all-to-all dispatcher in a world of one, experts one after the other: what it has without CUDA and
Transformer Engine. Gradients of weights are accumulated from call to call.
"""

from __future__ import annotations

import json
import os
import time
import warnings

import torch
import torch.nn.functional as F

from benchmarks.moe_layer import Sizes, size_arguments
from benchmarks.peers.megatron_cpu import import_megatron_on_cpu
from benchmarks.workload import start_process_group


def build(sizes: Sizes) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1, hidden_size=sizes.hidden, num_attention_heads=1, ffn_hidden_size=sizes.width,
        num_moe_experts=sizes.experts, moe_router_topk=sizes.top_k, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall", gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, hidden_dropout=0.0,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=sizes.experts, moe_grouped_gemm=False)
    layer = build_module(spec, config=config)
    layer.set_layer_number(1)
    return layer


def main() -> None:
    arguments = size_arguments(__doc__).parse_args()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import_megatron_on_cpu()
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    start_process_group()
    sizes = Sizes(arguments.tokens, arguments.hidden, arguments.experts, arguments.top_k, arguments.width)
    layer = build(sizes)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes.tokens, 1, sizes.hidden, generator=generator).requires_grad_()
    grad = torch.randn(x.shape, generator=generator)
    found: dict[str, list[float]] = {"forward": [], "backward": []}
    for index in range(arguments.rounds + 1):
        start = time.process_time()
        output = layer(x)[0]
        middle = time.process_time()
        output.backward(grad)
        end = time.process_time()
        if index:
            found["forward"].append(middle - start)
            found["backward"].append(end - middle)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
