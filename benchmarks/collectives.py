"""What collectives send: every one that a rank starts, with its payload and dtype."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    operation: str
    dtype: str


# The arguments that hold what travels whole: what an all-gather makes, what the others take.
_PAYLOAD_ARGUMENT = {
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "broadcast_": 0,
    "reduce_": 0,
    "allgather_": 0,
    "_allgather_base_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "alltoall_": 1,
    "alltoall_base_": 1,
}
# The same collective under the several names of its forms.
_NAMES = {
    "allreduce_coalesced_": "allreduce",
    "_allgather_base_": "allgather",
    "allgather_into_tensor_coalesced_": "allgather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "alltoall",
}
_NO_PAYLOAD = {"barrier", "monitored_barrier_"}


class CollectiveCounter(TorchDispatchMode):
    """While it is active, adds up the bytes of each kind of collective: of the whole tensor that is reduced or gathered, which
    all ranks share, whatever the algorithm sends for it."""

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[Collective] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "c10d":
            self._count(function.overloadpacket.__name__, arguments)
        return function(*arguments, **(keywords or {}))

    def _count(self, operation: str, arguments: Any) -> None:
        if operation in _NO_PAYLOAD:
            return
        tensors = [
            leaf for leaf in tree_leaves(arguments[_PAYLOAD_ARGUMENT[operation]]) if isinstance(leaf, torch.Tensor)
        ]
        for tensor in tensors:
            kind = Collective(_NAMES.get(operation, operation.strip("_")), str(tensor.dtype).removeprefix("torch."))
            self.payload_bytes[kind] += tensor.numel() * tensor.element_size()
