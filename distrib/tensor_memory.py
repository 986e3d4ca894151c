"""The bytes that tensors hold on this rank, counted by their storages: views count once, whoever keeps them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(values: Iterable[Any]) -> int:
    """Of those values that are tensors."""
    sizes: dict[int, int] = {}
    for value in values:
        if isinstance(value, torch.Tensor):
            add_storage(sizes, value)
    return sum(sizes.values())


def add_storage(sizes: dict[int, int], tensor: torch.Tensor) -> None:
    """Notes the bytes of a tensor's storage under what identifies it."""
    if tensor.device.type != "meta":
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()


class PeakMemory(TorchDispatchMode):
    """While it is active: the most bytes held at once by storages that are made or touched meanwhile, and by those that
    are `noted`, looked at after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def note(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts what is held already, before it is touched."""
        for tensor in tensors:
            self._note(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves((result, arguments)):
            if isinstance(leaf, torch.Tensor) and type(leaf) is torch.Tensor:
                self._note(leaf)
        self._look()
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            known = self._storages.get(storage._cdata)
            # An address may have been freed and taken again since the last look.
            if known is None or known() is None:
                self._storages[storage._cdata] = weakref.ref(storage)

    def _look(self) -> None:
        live = 0
        for address, reference in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[address]
            else:
                live += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, live)
