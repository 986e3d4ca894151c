"""The bytes that all live tensors of this process hold."""

from __future__ import annotations

import gc

import torch

from distrib.tensor_memory import add_storage


def live_bytes() -> int:
    """Of all tensors that Python can reach, gradients included."""
    gc.collect()
    sizes: dict[int, int] = {}
    for candidate in gc.get_objects():
        # By type: an isinstance check would call into lazy modules and proxies of other libraries.
        if type(candidate) is torch.Tensor or type(candidate) is torch.nn.Parameter:
            for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
                if type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter:
                    add_storage(sizes, tensor)
    return sum(sizes.values())
