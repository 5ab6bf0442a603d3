"""Data parallelism: FSDP2 cuts parameters, gradients and optimizer state over the data-parallel ranks.

Gradients are not averaged and not reduced by FSDP's own hooks: every loss is already divided by the counts of the
global batch, so gradients are sums, and they are summed once a step, when the pipeline schedule says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from r1mega.parallel_state import ParallelState

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState


def shard(stage: nn.Module, state: ParallelState, dtype: torch.dtype) -> None:
    """Cut the parameters of ``stage`` over the data-parallel ranks, in place; afterwards every one is a ``DTensor``.

    Every entry of an ``nn.ModuleDict`` or ``nn.ModuleList`` (a decoder layer) is gathered as one unit, the experts of
    a layer as another because their data-parallel group differs, and the rest of the stage as the last. A stage may
    be on the meta device: then call ``to_empty`` afterwards and initialise.

    Where there is one data-parallel rank and no cast, there is nothing to gather or to reduce, and FSDP would copy
    every parameter and gradient once a step: such parameters stay as they are.

    Args:
        stage: dense parameters are plain tensors or DTensors on ``state.mesh["tp"]``; those of experts are DTensors on
            ``state.expert_mesh["ep", "etp"]``.
        state: the layout's groups.
        dtype: of the computation. With bfloat16 the shards stay float32 (the master weights), are cast when they
            are gathered, and gradients are summed in float32.
    """
    casts = dtype == torch.bfloat16
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = mixed if casts else MixedPrecisionPolicy(cast_forward_inputs=False)
    dense, experts = state.mesh["dp"], state.expert_mesh["edp"]
    cut_experts, cut_dense = casts or experts.size() > 1, casts or max(dense.size(), experts.size()) > 1
    left_out = set() if cut_experts else {p for m in stage.modules() if _owns_experts(m) for p in m.parameters()}
    if not cut_dense:
        _make_dtensors(stage, dense)
        return
    for module in _units(stage):
        is_experts = _owns_experts(module)
        if is_experts and not cut_experts:
            continue
        unit = fully_shard(
            module,
            mesh=experts if is_experts else dense,
            reshard_after_forward=False,
            mp_policy=policy,
            shard_placement_fn=_expert_placement(experts.size()) if is_experts else None,
            ignored_params=left_out,
        )
        unit.set_gradient_divide_factor(1.0)
        # Without this FSDP multiplies inside the reduction (PREMUL_SUM), which gloo does not know.
        unit.set_force_sum_reduction_for_comms(True)
        if not casts:
            _gather_once_a_step(unit, stage)
    assert isinstance(stage, FSDPModule)
    stage.set_requires_gradient_sync(False)
    stage.set_reshard_after_backward(False)
    stage.set_is_last_backward(False)


def named_shards(stages: Iterable[nn.Module]) -> list[tuple[str, DTensor]]:
    """Names and shards of all parameters of this rank's stages, in the order of the modules.

    The shards are the same objects for the whole run, so one call after initialisation is enough. A name is there
    twice where two stages of this rank hold a copy of it.
    """
    found: list[tuple[str, DTensor]] = []
    for stage in stages:
        reshard(stage)
        for name, parameter in stage.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            found.append((name, parameter))
    return found


def gather(stage: nn.Module) -> None:
    """Gather all parameters now. A collective call; forward passes find them there and gather nothing.

    For forward passes that do not come at the same time on all data-parallel ranks. :func:`reshard` frees them.
    """
    if isinstance(stage, FSDPModule):
        stage._get_fsdp_state()._lazy_init()
        for group in _parameter_groups(stage):
            if not group.is_unsharded:
                group.unshard()
                group.wait_for_unshard()


def reshard(stage: nn.Module) -> None:
    """Free the gathered parameters, for example after a forward pass without a backward."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_gradients(stage: nn.Module) -> None:
    """Sum the accumulated gradients over the data-parallel ranks, and free the gathered parameters.

    Afterwards ``grad`` of every shard is the sum's shard; zeros where a parameter got no gradient. The next forward
    gathers the parameters anew.
    """
    is_cut = isinstance(stage, FSDPModule)
    for module in stage.modules():
        if not is_cut or (_owns_experts(module) and not isinstance(module, FSDPModule)):
            for parameter in module.parameters(recurse=False):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
    if not is_cut:
        return
    assert isinstance(stage, FSDPModule)
    groups = list(_parameter_groups(stage))
    for group in groups:
        _fill_missing_gradients(group)
        group.reduce_grads = group.reshard_after_backward = True
        group.post_backward()
    stage.set_is_last_backward(True)
    # The end of a backward pass as FSDP knows it: waits for the reductions and clears what it kept for the step.
    stage._get_fsdp_state()._root_post_backward_final_callback()
    stage.set_is_last_backward(False)
    for group in groups:
        group.reduce_grads = group.reshard_after_backward = False


def _gather_once_a_step(unit: FSDPModule, stage: nn.Module) -> None:
    """Gather the parameters of ``unit`` in the first forward of a step, and do nothing in all others.

    FSDP's own hooks put nodes into the graph of every microbatch, to look after gradients that are another type than
    the parameters. Without a cast there is nothing for them to do: on two ranks of a small model they took 5 % of a
    step.
    """
    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()

    def gather(module: nn.Module, inputs: object) -> None:
        assert isinstance(stage, FSDPModule)
        stage._get_fsdp_state()._lazy_init()
        for group in _groups_of(state):
            if not group.is_unsharded:
                group.unshard()
                group.wait_for_unshard()

    assert isinstance(unit, nn.Module)
    unit.register_forward_pre_hook(gather)


def _make_dtensors(stage: nn.Module, mesh: DeviceMesh) -> None:
    """Give plain parameters the form that FSDP would give them on a mesh of one rank."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in stage.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                if parameter not in made:
                    made[parameter] = nn.Parameter(
                        DTensor.from_local(parameter.data, mesh, [Shard(0)], run_check=False)
                    )
                setattr(module, name, made[parameter])


def _units(stage: nn.Module) -> Iterator[nn.Module]:
    """Modules that FSDP gathers as one, children before their parents, the stage itself last."""
    entries = {
        entry
        for container in stage.modules()
        if isinstance(container, (nn.ModuleDict, nn.ModuleList))
        for entry in container.children()
    }
    for module in reversed(list(stage.modules())):
        if module is stage or module in entries or _owns_experts(module):
            yield module


def _owns_experts(module: nn.Module) -> bool:
    return any(
        isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ())
        for parameter in module.parameters(recurse=False)
    )


def _expert_placement(num_shards: int) -> Callable[[nn.Parameter], Shard]:
    """Cut [experts, ..., rows, columns] by expert; by rows where the experts do not divide but the rows do."""

    def placement(parameter: nn.Parameter) -> Shard:
        assert isinstance(parameter, DTensor)
        num_experts, rows = parameter.to_local().shape[0], parameter.to_local().shape[-2]
        return Shard(parameter.dim() - 2 if num_experts % num_shards and rows % num_shards == 0 else 0)

    return placement


def _parameter_groups(stage: FSDPModule) -> Iterator[FSDPParamGroup]:
    """FSDP's parameter groups of ``stage``, outermost module first.

    FSDP2 has no public call for "reduce now": its own pipeline stage (``torch.distributed.pipelining.stage``,
    ``perform_reduce_grad``) takes this private way, too. A module had one group up to torch 2.11, several since.
    """
    for state in stage._get_fsdp_state()._state_ctx.all_states:
        yield from _groups_of(state)


def _groups_of(state: FSDPState) -> list[FSDPParamGroup]:
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _fill_missing_gradients(group: FSDPParamGroup) -> None:
    """Give zeros to the parameters without a gradient, as other ranks may have one and the collective needs all."""
    if not group.is_unsharded:
        group.unshard()
        group.wait_for_unshard()
    for shard in group.fsdp_params:
        whole = shard._unsharded_param
        if whole.requires_grad and whole.grad is None and shard.unsharded_accumulated_grad is None:
            whole.grad = torch.zeros_like(whole)
