"""The one place that knows how noisy an import of megatron-core is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# r1mega uses megatron-core's dataset files only: optimizers, Transformer Engine and Apex play no part in them.
_EXPECTED = [
    (UserWarning, "Transformer Engine and Apex are not installed"),
    (DeprecationWarning, "`torch.jit.script_method` is deprecated"),
    (DeprecationWarning, "The following imports from `dynamic_context.py` will be removed"),
]


@contextmanager
def quiet_import() -> Iterator[None]:
    """Keep silent the warnings that an import of megatron-core is known to give, and no others."""
    with warnings.catch_warnings():
        for category, message in _EXPECTED:
            warnings.filterwarnings("ignore", message, category)
        yield
