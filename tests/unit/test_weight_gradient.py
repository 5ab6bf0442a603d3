"""Layers of torch that hand over their weight gradients: the same numbers, later."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from r1mega.pipeline.actions import Table
from r1mega.pipeline.executor import PipelineExecutor, StageOutput
from r1mega.pipeline.schedules import make_table
from r1mega.pipeline.weight_gradient import WeightGradientStore, split_weight_gradients


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def frozen() -> nn.Linear:
    layer = nn.Linear(3, 4)
    layer.weight.requires_grad_(False)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "rows": (lambda: nn.Linear(3, 4), (5, 3), True),
    "one row": (lambda: nn.Linear(3, 4), (3,), True),
    "no row": (lambda: nn.Linear(3, 4), (0, 3), True),
    "sequences, no bias": (lambda: nn.Linear(3, 4, bias=False), (2, 5, 3), True),
    "frozen weight": (frozen, (5, 3), True),
    "embedding": (lambda: nn.Embedding(7, 4), (2, 5), True),
    "embedding with padding": (lambda: nn.Embedding(7, 4, padding_idx=3), (9,), True),
    "a forward of its own": (lambda: OwnForward(3, 4), (5, 3), False),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), (5, 3), False),
    "scaled by frequency": (lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), (9,), False),
    "another kind": (lambda: nn.LayerNorm(3), (5, 3), False),
}


def set_store(module: nn.Module, store: WeightGradientStore) -> None:
    for layer in module.modules():
        if hasattr(layer, "weight_gradients"):
            layer.weight_gradients = store


def input_for(layer: nn.Module, shape: tuple[int, ...], number: int) -> Tensor:
    torch.manual_seed(number)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 7, shape)
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_torch_and_wait_for_w_where_they_can(name: str) -> None:
    torch.manual_seed(0)
    make, shape, is_split = LAYERS[name]
    layer = make()
    reference, store = copy.deepcopy(layer), WeightGradientStore()
    names = [name for name, _ in layer.named_parameters()]
    assert split_weight_gradients(split_weight_gradients(layer)) is layer
    assert [name for name, _ in layer.named_parameters()] == names
    set_store(layer, store)
    for microbatch in range(2):
        mine, other = (input_for(layer, shape, microbatch) for _ in range(2))
        output = layer(mine)
        weight = torch.randn_like(output)
        before = [None if p.grad is None else p.grad.clone() for p in layer.parameters()]
        with store.deferred(0, microbatch):
            (output * weight).sum().backward()
        if is_split:
            after = [p.grad for p in layer.parameters()]
            assert all(a is b or torch.equal(a, b) for a, b in zip(before, after, strict=True))
        store.run(0, microbatch)
        (reference(other) * weight).sum().backward()
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad)
    for ours, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_under_autocast_gradients_have_the_type_of_the_weight() -> None:
    torch.manual_seed(0)
    layer = split_weight_gradients(nn.Linear(3, 4))
    reference = copy.deepcopy(layer)
    set_store(layer, WeightGradientStore())
    for module in (layer, reference):
        for _ in range(2):
            x = torch.arange(6.0).view(2, 3).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                output = module(x)
            assert output.dtype == torch.bfloat16
            output.float().sum().backward()
            assert x.grad.dtype == torch.float32
    for ours, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("parameter", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_parameter_is_called_as_autograd_would(kind: str, parameter: str) -> None:
    """Once a microbatch, with its gradient; the gradients are then ordinary autograd's, computed in the I."""
    torch.manual_seed(0)
    layers = [split_weight_gradients(nn.Linear(3, 4)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    store = WeightGradientStore()
    set_store(layers[0], store)
    seen: list[list[Tensor]] = [[], []]
    for layer, calls in zip(layers, seen, strict=True):
        hooked = getattr(layer, parameter)
        if kind == "register_hook":
            hooked.register_hook(lambda gradient, calls=calls: calls.append(gradient.clone()) or 2 * gradient)
        else:
            hooked.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(p.grad.clone()))
    for microbatch in range(2):
        x = torch.randn(5, 3)
        with store.deferred(0, microbatch):
            layers[0](x).square().sum().backward()
        layers[1](x).square().sum().backward()
        for mine, other in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
        store.run(0, microbatch)
    torch.testing.assert_close(*seen)
    assert len(seen[0]) == 2


def test_a_hook_that_was_removed_is_no_hook() -> None:
    layer = split_weight_gradients(nn.Linear(3, 4))
    set_store(layer, store := WeightGradientStore())
    layer.weight.register_hook(lambda gradient: gradient).remove()
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: None).remove()
    with store.deferred(0, 0):
        layer(torch.randn(5, 3)).sum().backward()
    assert layer.weight.grad is None and len(store.pending[0, 0]) == 1


def test_an_embedding_with_a_hook_on_its_weight_is_left_to_autograd() -> None:
    layer = split_weight_gradients(nn.Embedding(7, 4))
    set_store(layer, store := WeightGradientStore())
    layer.weight.register_hook(lambda gradient: 2 * gradient)
    with store.deferred(0, 0):
        layer(torch.tensor([1, 2, 2])).sum().backward()
    assert layer.weight.grad[:, 0].tolist() == [0, 2, 4, 0, 0, 0, 0]


def test_a_tied_weight_collects_both_gradients() -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = split_weight_gradients(nn.Sequential(embedding, head))
    reference = copy.deepcopy(model)
    set_store(model, WeightGradientStore())
    for module in (model, reference):
        module(torch.tensor([1, 2, 2])).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, reference[0].weight.grad)


class CheckpointedStage(nn.Module):
    """Two linear layers under torch's checkpoint, which computes them again inside the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, activations: tuple[Tensor, ...], microbatch: Tensor) -> StageOutput:
        output = checkpoint(self.layers, microbatch.requires_grad_(), use_reentrant=False)
        return StageOutput(losses=(output.square().sum(),))


@pytest.mark.parametrize("row", ["0F0,0F1,0B0,0I1,0W1,0R", "0F0,0F1,0I1,0B0,0W1,0R", "0F0,0I0,0F1,0B1,0W0,0R"])
def test_a_stage_may_have_whole_and_split_backwards_with_checkpoints_inside(row: str) -> None:
    torch.manual_seed(0)
    stage = CheckpointedStage()
    expected = copy.deepcopy(stage)
    microbatches = [torch.randn(4, 3), torch.randn(6, 3)]
    for microbatch in microbatches:
        expected((), microbatch.clone()).losses[0].backward()
    executor = PipelineExecutor(Table.from_csv(row), {0: stage}, None)
    for _ in range(2):  # the second time gradients are there already
        for parameter in stage.parameters():
            parameter.grad = None
        executor.run([microbatch.clone() for microbatch in microbatches])
        for mine, other in zip(stage.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)


class Head(nn.Module):
    """One rank's whole model: two linear layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, activations: tuple[Tensor, ...], microbatch: Tensor) -> StageOutput:
        return StageOutput(losses=(self.layers(microbatch).square().sum(),))


def test_each_of_two_executors_over_the_same_stages_puts_weight_gradients_off_until_its_w() -> None:
    """As for the last, shorter batch of an epoch, or an evaluation between steps."""
    stage = Head()
    executors = {
        count: PipelineExecutor(make_table("zb-h1", 1, count), {0: stage}, None) for count in (3, 2)
    }  # fmt: skip
    for count in (3, 2, 3):
        store = executors[count].weight_gradients
        late: list[int] = []

        def run(number: int, microbatch: int, store: WeightGradientStore = store, late: list[int] = late) -> None:
            late.append(len(store.pending[number, microbatch]))
            WeightGradientStore.run(store, number, microbatch)

        store.run = run  # type: ignore[method-assign]
        executors[count].run([torch.randn(4, 3) for _ in range(count)])
        assert late == [2] * count, "both layers of each microbatch"
