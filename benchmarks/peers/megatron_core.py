"""megatron-core training the step benchmark's workload on CPU; the program of one rank.

    torchrun --nproc-per-node 2 -m benchmarks.peers.megatron_core --ep 2

prints one line of JSON (see :class:`benchmarks.workload.Measurement`). Settings that are a matter of speed are
chosen in Megatron's favour: no recomputation, ``isend``/``irecv`` between stages, all-to-all dispatcher, eager mode.
Its all-gather dispatcher and its fused SwiGLU, with and without torch.compile, were measured and are no faster.
What a CPU cannot have is absent: Transformer Engine, Apex, grouped GEMM, flash attention.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.megatron_cpu import import_megatron_on_cpu
from benchmarks.workload import (
    Workload,
    argument_parser,
    initial_weight,
    measure,
    microbatches_of,
    profile_step,
    report,
    sequence,
    start_process_group,
    workload_from,
)

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer.transformer_config import TransformerConfig


class MegatronTrainer:
    """The workload in megatron-core on this rank: model, optimizer, schedule.

    The process group must exist, :func:`import_megatron_on_cpu` must have run. ``model`` is this rank's stage in
    Megatron's ``DistributedDataParallel``.
    """

    def __init__(self, workload: Workload, tp: int = 1, pp: int = 1, ep: int = 1) -> None:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        # expert tensor parallelism is left at Megatron's default, tp
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep
        )
        self.workload, self.tp = workload, tp
        self.model, self.optimizer = _model_and_optimizer(workload, tp, pp, ep)
        self.dp = parallel_state.get_data_parallel_world_size()
        mine = microbatches_of(workload, parallel_state.get_data_parallel_rank())
        self.tokens_per_step = self.dp * len(mine) * workload.sequence_length
        self.microbatches = [tuple(t[None] for t in sequence(workload, i)) for i in mine]
        self.positions = torch.arange(workload.sequence_length)[None]
        self.run_schedule = get_forward_backward_func()

    def _forward_step(self, microbatches: Iterator, model: nn.Module) -> tuple[Tensor, Callable]:
        tokens, labels = next(microbatches)

        def mean_loss(token_losses: Tensor) -> tuple[Tensor, Tensor]:
            loss = token_losses.mean()
            return loss, loss.detach().clone()  # Megatron divides the first by the number of microbatches in place

        return model(tokens, self.positions, None, labels=labels), mean_loss

    def step(self) -> tuple[float, float]:
        """Train one step; this rank's share of the loss and the global gradient norm."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.run_schedule(
            forward_step_func=self._forward_step,
            data_iterator=iter(self.microbatches),
            model=self.model,
            num_microbatches=len(self.microbatches),
            seq_length=self.workload.sequence_length,
            micro_batch_size=1,
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        # the last stage alone has losses; all its tp ranks have the same ones
        share = torch.stack(losses).mean().item() / (self.dp * self.tp) if losses else 0.0
        return share, float(grad_norm)


def _model_and_optimizer(workload: Workload, tp: int, pp: int, ep: int) -> tuple[nn.Module, MegatronOptimizer]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = _transformer_config(workload, tp, pp, ep)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=workload.num_experts, moe_grouped_gemm=False, normalization="RMSNorm"
        ),
        vocab_size=workload.vocab_size,
        max_sequence_length=workload.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=workload.rope_theta,
    )
    fill_initial_weights(model, workload)
    model = DistributedDataParallel(
        config=config, ddp_config=DistributedDataParallelConfig(overlap_grad_reduce=False), module=model
    )
    config.finalize_model_grads_func = finalize_model_grads
    adam = OptimizerConfig(
        lr=workload.learning_rate, weight_decay=0.0, clip_grad=0.0, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8
    )
    return model, get_megatron_optimizer(adam, [model])


def _transformer_config(workload: Workload, tp: int, pp: int, ep: int) -> TransformerConfig:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=workload.num_layers,
        hidden_size=workload.hidden_size,
        num_attention_heads=workload.num_heads,
        ffn_hidden_size=workload.expert_width,
        num_moe_experts=workload.num_experts,
        moe_router_topk=workload.top_k,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=ep,
        normalization="RMSNorm",
        layernorm_epsilon=workload.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        # these need Apex or CUDA
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=True,
    )


@torch.no_grad()
def fill_initial_weights(model: nn.Module, workload: Workload) -> None:
    """Give a Megatron ``GPTModel`` (this rank's part of it) the workload's initial weights.

    Megatron's layouts: ``linear_qkv`` holds for each head its query, key and value rows; ``linear_fc1`` holds the gate
    rows, then the up rows, both of this rank's part of the expert.
    """
    from megatron.core import parallel_state

    tp, tp_rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    hidden, width, heads = workload.hidden_size, workload.expert_width, workload.num_heads
    vocab, experts = workload.vocab_size, workload.num_experts

    def cut(weight: Tensor, dim: int) -> Tensor:
        return weight.chunk(tp, dim)[tp_rank]

    if model.pre_process:
        embedding = initial_weight("embed_tokens.weight", (vocab, hidden))
        model.embedding.word_embeddings.weight.copy_(cut(embedding, 0))
    if model.post_process:
        model.decoder.final_layernorm.weight.copy_(initial_weight("norm.weight", (hidden,)))
        model.output_layer.weight.copy_(cut(initial_weight("lm_head.weight", (vocab, hidden)), 0))
    for layer in model.decoder.layers:
        name = f"layers.{layer.layer_number - 1}"
        layer.input_layernorm.weight.copy_(initial_weight(f"{name}.input_layernorm.weight", (hidden,)))
        layer.pre_mlp_layernorm.weight.copy_(initial_weight(f"{name}.post_attention_layernorm.weight", (hidden,)))
        q, k, v, o = (initial_weight(f"{name}.self_attn.{p}_proj.weight", (hidden, hidden)) for p in "qkvo")
        by_head = torch.stack([x.view(heads, workload.head_dim, hidden) for x in (q, k, v)], dim=1)
        layer.self_attention.linear_qkv.weight.copy_(cut(by_head, 0).reshape(-1, hidden))
        layer.self_attention.linear_proj.weight.copy_(cut(o, 1))
        layer.mlp.router.weight.copy_(initial_weight(f"{name}.mlp.gate.weight", (experts, hidden)))
        gate = initial_weight(f"{name}.mlp.experts.gate_proj", (experts, width, hidden))
        up = initial_weight(f"{name}.mlp.experts.up_proj", (experts, width, hidden))
        down = initial_weight(f"{name}.mlp.experts.down_proj", (experts, hidden, width))
        for expert, index in zip(layer.mlp.experts.local_experts, layer.mlp.local_expert_indices, strict=True):
            expert.linear_fc1.weight.copy_(torch.cat([cut(gate[index], 0), cut(up[index], 0)]))
            expert.linear_fc2.weight.copy_(cut(down[index], 1))


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron insists on it under tensor parallelism
    import_megatron_on_cpu()
    import megatron.core

    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    start_process_group()
    workload = workload_from(arguments)
    trainer = MegatronTrainer(workload, arguments.tp, arguments.pp, arguments.ep)
    name = f"megatron-core {megatron.core.__version__}"
    report(measure(name, trainer.tokens_per_step, trainer.step, arguments.num_steps))
    if arguments.profile:
        profile_step(trainer.step, arguments.profile)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
