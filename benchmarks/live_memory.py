"""The bytes that tensors hold on this rank, counted by their storages: views count once, whoever keeps them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def live_bytes() -> int:
    """Of all tensors that Python can reach, gradients included."""
    gc.collect()
    sizes: dict[int, int] = {}
    for candidate in gc.get_objects():
        # By type: an isinstance check would call into lazy modules and proxies of other libraries.
        if type(candidate) is torch.Tensor or type(candidate) is torch.nn.Parameter:
            for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
                if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
                    _add_storage(sizes, tensor)
    return sum(sizes.values())


def _add_storage(sizes: dict[int, int], tensor: torch.Tensor) -> None:
    if tensor.device.type != "meta":
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()


def storage_bytes(values: Iterable[Any]) -> int:
    """Of those values that are tensors."""
    sizes: dict[int, int] = {}
    for value in values:
        if isinstance(value, torch.Tensor):
            _add_storage(sizes, value)
    return sum(sizes.values())


class PeakMemory(TorchDispatchMode):
    """While it is active: the most bytes that storages made meanwhile held at once, looked at after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves((result, arguments)):
            if isinstance(leaf, torch.Tensor) and type(leaf) is torch.Tensor and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                self._storages.setdefault(storage._cdata, weakref.ref(storage))
        self._look()
        return result

    def _look(self) -> None:
        live = 0
        for address, reference in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[address]
            else:
                live += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, live)
