"""Tiny, strong models made by transformers, and what they and r1mega say to the same tokens."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_layers import MtpModel

from r1mega.config import ModelConfig
from r1mega.kernels.parameter import local
from r1mega.model.blocks import list_blocks
from r1mega.model.huggingface import load_huggingface, model_config_from
from r1mega.model.stage import Stage, build_stage
from r1mega.parallel_state import ParallelState
from tests.peers.checkpoint_runner import Answer, make_batch

# Progress bars are no part of a clean test run.
transformers.utils.logging.disable_progress_bar()

LENGTH = 24
SEQUENCES = 2
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 1.0,
}  # fmt: skip
COMMON = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 64, "use_cache": False, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK = COMMON | {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "first_k_dense_replace": 1, "n_routed_experts": 16, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "rope_theta": 10000.0, "rope_scaling": YARN, "num_nextn_predict_layers": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def make_model(kind: str, seed: int = 0, **settings: object) -> nn.Module:
    """A model of transformers, ``DeepseekV3``, ``Qwen2``, ..., with weights that let no term hide.

    Matrices have standard deviation 0.15, norms are about 1, and the router's score bias decides choices.
    """
    config = getattr(transformers, f"{kind}Config")(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    strengthen(model, generator)
    return model


@torch.no_grad()
def strengthen(model: nn.Module, generator: torch.Generator) -> None:
    """Replace all weights by random ones."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith(("e_score_correction_bias", ".bias")):
            tensor.copy_(0.2 * noise)
        elif "inv_freq" not in name:
            tensor.copy_(0.15 * noise)


def make_tokens(vocab_size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Token ids ``[b, s]`` and transformers' labels: the same ids, some of them left out of the loss (-100)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (SEQUENCES, LENGTH), generator=generator)
    labels = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.2, -100)
    return tokens, labels


def answer_of_transformers(model: nn.Module, tokens: Tensor, labels: Tensor) -> Answer:
    model.zero_grad()
    output = model(input_ids=tokens, labels=labels)
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= dict(translate(name, parameter.grad))
    return Answer(output.logits.detach(), output.loss.detach(), gradients)


def translate(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Name in transformers (whose gate and up stand one below the other) to r1mega's names."""
    name = name.removeprefix("model.")
    if name.endswith("experts.gate_up_proj"):
        return [(name, tensor.unflatten(1, (2, -1)))]
    return [(name, tensor)]


def load(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Stage, ModelConfig]:
    """The whole model of a checkpoint in one process."""
    config = model_config_from(path)
    stage = build_stage(config, ParallelState.single_process(), list_blocks(config, LENGTH), dtype, "cpu")
    with torch.no_grad():
        for tensor in [*stage.parameters(), *stage.buffers()]:
            local(tensor).fill_(float("nan") if tensor.is_floating_point() else -1)
    load_huggingface(stage, config, path)
    return stage, config


def make_mtp(model: nn.Module, num_layers: int, seed: int = 5) -> MtpModel:
    """MTP layers for ``model``: transformers' own, around its decoder layers; embedding and head are the model's."""
    model.config.num_nextn_predict_layers = num_layers
    mtp = MtpModel(model, num_layers).eval()
    strengthen(mtp.layers, torch.Generator().manual_seed(seed))
    return mtp


def save_with_mtp(model: nn.Module, mtp: MtpModel, folder: Path) -> None:
    """What ``save_pretrained`` writes, and the MTP layers in the form of DeepSeek's releases."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for index, layer in enumerate(mtp.layers):
        prefix = f"model.layers.{model.config.num_hidden_layers + index}"
        for name, tensor in layer.state_dict().items():
            released = name.removeprefix("mtp_block.").replace(
                "post_norm", "shared_head.norm", name.startswith("post_norm")
            )
            if released.endswith("experts.gate_up_proj"):
                gate, up = tensor.chunk(2, dim=1)
                matrices = {"gate_proj": gate, "up_proj": up}
            elif released.endswith("experts.down_proj"):
                matrices = {"down_proj": tensor}
            else:
                tensors[f"{prefix}.{released}"] = tensor.clone()
                continue
            for projection, experts in matrices.items():
                for expert, matrix in enumerate(experts):
                    tensors[f"{prefix}.mlp.experts.{expert}.{projection}.weight"] = matrix.clone()
        tensors[f"{prefix}.embed_tokens.weight"] = model.get_input_embeddings().weight.detach().clone()
        tensors[f"{prefix}.shared_head.head.weight"] = model.lm_head.weight.detach().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def mtp_answer_of_transformers(
    model: nn.Module, mtp: MtpModel, tokens: Tensor, labels: Tensor, coefficient: float
) -> Answer:
    """The same with MTP layers; the loss is the main one plus ``coefficient`` times the mean of theirs."""
    batch = make_batch(tokens, labels)
    model.zero_grad()
    mtp.zero_grad()
    hidden = model.model(input_ids=tokens).last_hidden_state
    logits = [model.lm_head(hidden)]
    loss = _masked_loss(logits[0], batch.labels, batch.loss_mask, batch.num_loss_tokens)
    for depth in range(len(mtp.layers)):
        ids, target, mask = (
            shift(batch.labels, depth),
            shift(batch.labels, depth + 1),
            shift(batch.loss_mask, depth + 1),
        )
        hidden = mtp.forward_layer(depth, hidden, torch.arange(tokens.shape[1])[None], None, input_ids=ids)
        logits.append(mtp.shared_head(hidden))
        part = _masked_loss(logits[-1], target, mask & batch.loss_mask, batch.num_loss_tokens)
        loss = loss + part * coefficient / len(mtp.layers)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= dict(translate(name, parameter.grad))
    for index, layer in enumerate(mtp.layers):
        for name, parameter in layer.named_parameters():
            name = {"post_norm.weight": "norm.weight"}.get(name, name.replace("mtp_block.", "layer."))
            gradients |= dict(translate(f"mtp.{index}.{name}", parameter.grad))
    logits = [part.detach() for part in logits]
    return Answer(logits[0], loss.detach(), gradients, logits)


def shift(values: Tensor, steps: int) -> Tensor:
    """``[b, s]`` moved left; zero comes in from the right."""
    return torch.nn.functional.pad(values, (0, steps))[:, steps:]


def _masked_loss(logits: Tensor, labels: Tensor, mask: Tensor, count: int) -> Tensor:
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (loss * mask.flatten()).sum() / count


def answer_of_stage(stage: Stage, tokens: Tensor, labels: Tensor) -> Answer:
    """The whole model in one stage: an ordinary forward and backward."""
    with torch.no_grad():
        logits = stage((), make_batch(tokens, None)).metrics["logits"]
    predictions: list[Tensor] = []
    stage.lm_head.register_forward_hook(lambda module, inputs, output: predictions.append(output.detach().clone()))
    output = stage((), make_batch(tokens, labels))
    torch.autograd.backward(output.losses)
    gradients = {name: local(parameter.grad) for name, parameter in stage.named_parameters()}
    loss = torch.stack([loss.detach() for loss in output.losses]).sum()
    shape = (*tokens.shape, -1)
    return Answer(logits.view(shape), loss, gradients, [part.view(shape) for part in predictions])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same(ours: Answer, theirs: Answer, tolerance: float = 1e-5) -> None:
    """Logits, loss and the gradient of every parameter agree; a parameter that one side lacks is an error."""
    assert difference(ours.logits, theirs.logits) < tolerance
    for depth, wanted in enumerate(theirs.predictions):
        assert difference(ours.predictions[depth], wanted) < tolerance, f"prediction of MTP depth {depth}"
    assert difference(ours.loss.view(1), theirs.loss.view(1)) < tolerance
    assert set(ours.gradients) == set(theirs.gradients)
    differences = {name: difference(ours.gradients[name], theirs.gradients[name]) for name in theirs.gradients}
    assert all(value < tolerance for value in differences.values()), differences
