"""Weight gradients as explicit work: run inside the backward, or kept for later.

A layer that knows this store computes only the gradient of its input in its backward and hands over a closure that
adds the weight gradient to ``weight.grad``. Run at once, that is an ordinary backward (``B``). Kept under (stage,
microbatch), the backward was an ``I`` of a zero-bubble schedule and the closures are its ``W`` (arXiv 2401.10241).

Three kinds of layers, and in each every gradient is computed once:

* A layer that knows the store: a module with an attribute ``weight_gradients`` (None until an executor sets it), whose
  ``autograd.Function`` calls ``store.add(work)`` in its backward and returns None as the gradient of its weight.
* ``nn.Linear`` and ``nn.Embedding``, in which nearly all weights of a plain model are: :func:`split_weight_gradients`
  makes them such layers, and the executor calls it on every stage that has an ``I``.
* All others (norms, single parameters, Functions that return the gradient of their weight): ordinary autograd computes
  it in the ``I``, together with that of the input. Nothing is lost, but that work cannot fill a bubble.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Work = Callable[[], None]


class WeightGradientStore:
    """Weight-gradient work of one rank. Runs work at once except inside :meth:`deferred`.

    Attributes:
        pending: kept work by (stage, microbatch), in the order in which it was added. Work that is left at the end of a
            run would be a lost gradient: see :meth:`require_empty`.
        will_split: what runs now belongs to a stage and microbatch that have an I. Layers whose ordinary backward is
            faster than a handed-over one need the store only then.
    """

    def __init__(self) -> None:
        self.pending: dict[tuple[int, int], list[Work]] = {}
        self.will_split = True
        self._kept: list[Work] | None = None

    def add(self, work: Work) -> None:
        """Take work from a layer's backward: run it now, or keep it while inside :meth:`deferred`."""
        if self._kept is None:
            work()
        else:
            self._kept.append(work)

    @contextmanager
    def deferred(self, stage: int, microbatch: int) -> Iterator[None]:
        """While inside, keep the work under (stage, microbatch). Raises RuntimeError if that key is pending already."""
        if (stage, microbatch) in self.pending:
            raise RuntimeError(f"weight gradients of stage {stage}, microbatch {microbatch} are pending already")
        self._kept = self.pending[stage, microbatch] = []
        try:
            yield
        finally:
            self._kept = None

    def run(self, stage: int, microbatch: int) -> None:
        """Run and forget the work kept under (stage, microbatch). Raises RuntimeError if there never was any ``I``."""
        kept = self.pending.pop((stage, microbatch), None)
        if kept is None:
            raise RuntimeError(f"no weight gradients are pending for stage {stage}, microbatch {microbatch}")
        with torch.no_grad():
            kept.reverse()
            while kept:  # each closure is dropped as soon as it ran, and the activations that it holds with it
                kept.pop()()

    def require_empty(self) -> None:
        """Raise RuntimeError if work is left: a ``W`` is missing, and gradients would be silently wrong."""
        if self.pending:
            keys = ", ".join(f"stage {stage} microbatch {microbatch}" for stage, microbatch in self.pending)
            raise RuntimeError(f"weight gradients were never computed for {keys}")


def split_weight_gradients(module: nn.Module) -> nn.Module:
    """Let every ``nn.Linear`` and ``nn.Embedding`` in ``module`` hand over its weight gradient, where it has a store.

    In place; parameters, names, hooks and results stay as they are, and without a store the layers are what they were.
    Layers of a subclass with a forward of its own, and embeddings with ``sparse``, ``max_norm`` or
    ``scale_grad_by_freq``, are left alone, and so are parametrized weights. A layer whose weight or bias has a hook
    (``register_hook``, ``register_post_accumulate_grad_hook``) is left to autograd in each forward, so that the hook
    sees what it always sees, in the I. Other gradients arrive in ``weight.grad`` without autograd's knowing, so that
    hooks on its nodes are not called: reduce them in R, not by ``DistributedDataParallel``.

    Returns:
        ``module``.
    """
    for layer in module.modules():
        if hasattr(layer, "weight_gradients") or "forward" in vars(layer):
            continue
        if type(layer).forward is nn.Linear.forward:
            forward: Callable[..., Tensor] = _linear
        elif type(layer).forward is nn.Embedding.forward and _is_a_plain_lookup(layer):
            forward = _embedding
        else:
            continue
        layer.weight_gradients = None  # type: ignore[assignment]
        layer.forward = MethodType(forward, layer)
    return module


def _is_a_plain_lookup(layer: Any) -> bool:
    return not (layer.sparse or layer.scale_grad_by_freq) and layer.max_norm is None


def _linear(layer: Any, x: Tensor) -> Tensor:
    weight, bias, store = layer.weight, layer.bias, layer.weight_gradients
    if store is None or not store.will_split or _needs_autograd(weight) or (bias is not None and _needs_autograd(bias)):
        return nn.functional.linear(x, weight, bias)
    output: Tensor = _Linear.apply(x, weight, bias, store)
    return output


def _needs_autograd(parameter: Tensor) -> bool:
    """Whether it keeps no gradient, since a parametrization computes it anew each time, or has a hook."""
    hooks: Any = parameter._backward_hooks, parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    return not parameter.is_leaf or any(hooks)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, store):
        ctx.save_for_backward(x)
        # Not saved through autograd: FSDP frees and refills the storage of weights between forward and backward.
        ctx.weight, ctx.bias, ctx.store = weight, bias, store
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (x,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        if wants_weight or wants_bias:
            parameters = weight if wants_weight else None, bias if wants_bias else None
            ctx.store.add(partial(_add_linear, *parameters, x.detach(), gradient))
        # autocast leaves the weight in float32 and the gradient in a shorter type
        return (gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None), None, None, None


@torch.no_grad()
def _add_linear(weight: Tensor | None, bias: Tensor | None, x: Tensor, gradient: Tensor) -> None:
    gradient = gradient.flatten(0, -2) if gradient.dim() > 1 else gradient.unsqueeze(0)
    if weight is not None:
        rows = x.reshape(gradient.shape[0], x.shape[-1]).to(gradient.dtype)
        if weight.grad is not None and weight.grad.dtype == gradient.dtype:
            weight.grad.addmm_(gradient.t(), rows)  # in the product: no second tensor of the weight's size
        else:
            _accumulate(weight, gradient.t() @ rows)
    if bias is not None:
        _accumulate(bias, gradient.sum(0))


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad += gradient


def _embedding(layer: Any, ids: Tensor) -> Tensor:
    store = layer.weight_gradients
    if store is None or not store.will_split or _needs_autograd(layer.weight):
        return nn.functional.embedding(ids, layer.weight, layer.padding_idx)
    output: Tensor = _Embedding.apply(ids, layer.weight, layer.padding_idx, store)
    return output


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding, store):
        ctx.ids, ctx.weight, ctx.padding, ctx.store = ids, weight, padding, store
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, gradient):
        ctx.store.add(partial(_add_embedding, ctx.weight, ctx.ids, ctx.padding, gradient))
        return None, None, None, None


@torch.no_grad()
def _add_embedding(weight: Tensor, ids: Tensor, padding: int | None, gradient: Tensor) -> None:
    num_rows, padding = weight.shape[0], -1 if padding is None else padding
    _accumulate(weight, torch.ops.aten.embedding_dense_backward(gradient, ids, num_rows, padding, False))
