"""Counts what PyTorch's operations do below autograd: matrix products, and the bytes that live at once.

Exact and the same on every machine, unlike time: a tensor that an operation is given or returns is followed until
nothing holds it. What an operation allocates and frees inside itself is not seen. While it counts, PyTorch multiplies:
products of the C++ kernel pass no dispatcher.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1mega.kernels import products

aten = torch.ops.aten
Product = tuple[int, int, int]


class TensorWatch(TorchDispatchMode):
    """Context manager.

    Args:
        before: tensors that were there before and do not count.

    Attributes:
        products: (rows, inner, columns) of each matrix product, in order.
        peak: the most bytes that lived at once, of storages that were not there before.
        live: the bytes that live now.
    """

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage()._cdata for tensor in before}
        self.products: list[Product] = []
        self.peak = self.live = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def flops(self) -> int:
        """Of the matrix products."""
        return sum(2 * rows * inner * columns for rows, inner, columns in self.products)

    def __enter__(self) -> TensorWatch:
        self._patch = mock.patch.object(products, "native_multiplies", lambda: False)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            left, right = args[0:2] if function.overloadpacket is aten.mm else args[1:3]
            self.products.append((left.shape[0], left.shape[1], right.shape[1]))
        assert function.overloadpacket not in (aten.bmm, aten.baddbmm, aten.baddbmm_), "a product that nobody counts"
        result = function(*args, **kwargs)
        # also what it was given: not all memory comes from an operation
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._before:
                self._follow(tensor)
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
        self.live = sum(num_bytes for _, num_bytes in self._known.values())
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._known[reference.cdata] = (reference, storage.nbytes())
