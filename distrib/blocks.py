"""What is done to a model block by block, before it is sharded: recomputing activations, then compiling.

Both keep every parameter's name. A model without `blocks()` is one block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_ATEN = torch.ops.aten
# Matrix products, convolutions and attention: dear to compute, and their outputs are few.
_KEPT = frozenset(
    {
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN.convolution.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The parts that a model wants treated one by one."""
    return cast(Any, module).blocks() if hasattr(module, "blocks") else [module]


def prepare_blocks(module: nn.Module, *, activation_checkpointing: str, compile_blocks: bool) -> None:
    """`full` keeps a block's inputs alone and computes it again in the backward pass; `selective` also keeps the outputs of
    what is dear to compute. The values are the same: random numbers are drawn again as they were."""
    for block in blocks_of(module):
        if activation_checkpointing != "none":
            _recompute(block, selective=activation_checkpointing == "selective")
        if compile_blocks:
            block.compile()


def _recompute(block: nn.Module, *, selective: bool) -> None:
    forward: Callable[..., Any] = block.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = _selective_contexts

    @functools.wraps(forward)
    def recomputed(*inputs: Any, **named: Any) -> Any:
        return checkpoint(forward, *inputs, **options, **named)

    block.forward = recomputed


def _selective_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
