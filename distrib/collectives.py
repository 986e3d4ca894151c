"""What collectives send: every one that a rank starts, with its dtype, the size of its group, and its payload."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    operation: str
    dtype: str
    ranks: int
    """In its group."""


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
    """While it is active, counts each kind of collective and adds up its bytes: of the whole tensor that is reduced or
    gathered, which all ranks share, whatever the algorithm sends for it."""

    def __init__(self) -> None:
        super().__init__()
        self.payload_bytes: Counter[Collective] = Counter()
        self.calls: Counter[Collective] = Counter()

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
        name, ranks = _NAMES.get(operation, operation.strip("_")), _ranks_of(arguments)
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
        for dtype in dtypes:
            self.calls[Collective(name, dtype, ranks)] += 1
        for tensor in tensors:
            kind = Collective(name, str(tensor.dtype).removeprefix("torch."), ranks)
            self.payload_bytes[kind] += tensor.numel() * tensor.element_size()


def _ranks_of(arguments: Any) -> int:
    """The size of the process group among a collective's arguments."""
    groups = [argument for argument in arguments if _is_group(argument)]
    assert len(groups) == 1, "a collective has one process group"
    return dist.ProcessGroup.unbox(groups[0]).size()


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and argument._type().qualified_name().endswith(".ProcessGroup")
