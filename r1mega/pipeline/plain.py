"""An adapter that makes a pipeline stage of any module that maps a tensor to a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from r1mega.pipeline.executor import StageOutput


class PlainStage(nn.Module):
    """A stage for modules of other stacks: tensor in, tensor out.

    Args:
        module: stage 0 is called with the microbatch itself where that is a tensor, else with its first element;
            the others with what the stage before returned.
        loss_function: given on the last stage: ``loss_function(output, microbatch)`` is the scalar that is
            differentiated, and the metric ``loss``. Losses of microbatches are added up: divide by their number there.
    """

    def __init__(self, module: nn.Module, loss_function: Callable[[Tensor, Any], Tensor] | None = None) -> None:
        super().__init__()
        self.module = module
        self.loss_function = loss_function

    def forward(self, activations: tuple[Tensor, ...], microbatch: Any) -> StageOutput:
        """Run the module on ``activations``, or on the microbatch where there are none."""
        if not activations:
            activations = (microbatch if isinstance(microbatch, Tensor) else microbatch[0],)
        output = self.module(*activations)
        if self.loss_function is None:
            return StageOutput((output,))
        loss = self.loss_function(output, microbatch)
        return StageOutput(losses=(loss,), metrics={"loss": loss})
