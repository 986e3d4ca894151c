"""Documents side by side in one sequence: positions that start anew at each, and masks that keep attention within one.

Where there is a GPU, attention skips the blocks of the mask in which no token sees another (FlexAttention, Dong et al.
2024), so that its work follows the documents' lengths. Unlike the kernels that take the documents' lengths as a list, it
needs nothing of the documents on the host, where reading their number would wait for the device; it also computes in
fp32, and the same bits every time.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# What FlexAttention asks of a head.
LEAST_HEAD_WIDTH = 16


def document_positions(documents: Tensor) -> Tensor:
    """Each token's place in its document, (B, T) int64, from the documents' numbers (B, T): equal neighbours are one."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def document_mask(documents: Tensor) -> Tensor:
    """Who sees whom, (B, 1, T, T) bool: a token those before it in its document, and itself."""
    tokens = documents.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal).unsqueeze(1)


def document_blocks(documents: Tensor) -> BlockMask:
    """`document_mask` as FlexAttention takes it: which blocks of 128 x 128 hold anything to be seen."""
    samples, tokens = documents.shape

    def sees(sample: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[sample, query] == documents[sample, key]) & (query >= key)

    return _compiled(create_block_mask)(sees, samples, None, tokens, tokens, device=documents.device)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, grouped: bool) -> Tensor:
    """(B, H, T, head_width) each, fewer heads of keys and values where `grouped` -> the values seen, as the queries."""
    attention: Callable[..., Tensor] = flex_attention
    if not torch.compiler.is_compiling():  # a block that is compiled as a whole compiles it too
        attention = _compiled(flex_attention)
    return attention(query, key, value, block_mask=mask, enable_gqa=grouped)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Uncompiled, both would build the whole square. Shapes are few: a micro-batch, and the ragged ends.
    return torch.compile(function, dynamic=False)
