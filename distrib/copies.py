"""Whether ranks that must hold the same bytes do: a checksum of what each of them trains, computed without waiting."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from distrib.optimizer import state_tensors

# Words that are weighed at once: on a CPU what stays in its caches, on a GPU what keeps it busy.
_WORDS = {"cpu": 1 << 16, "cuda": 1 << 22}
_WORD_BYTES = 8
# Odd, and otherwise of no meaning (the golden ratio in 64 bits).
_MULTIPLIER = -0x61C8864680B583EB


@dataclass(frozen=True)
class Copies:
    """What this rank holds that other ranks must hold too, byte for byte."""

    tensors: dict[str, torch.Tensor]
    """Under their canonical names; live."""
    shards: int
    """Ranks whose numbers differ by a multiple of this hold the same; 1: all of them do."""


def whole_copies(module: nn.Module, optimizer: torch.optim.Optimizer) -> Copies:
    """Weights and the optimizer's state, where every rank has all of them. Buffers may differ: they are never reduced."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for state, tensor in state_tensors(optimizer, parameter).items():
            tensors[f"optimizer.{state}.{name}"] = tensor
    return Copies(tensors, shards=1)


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A scalar int64 on the tensors' device, a function of their bytes and order alone.

    The bytes are taken as 64-bit words, each is multiplied by an odd weight of its own, and everything is summed modulo
    2**64. One flipped bit alters the sum by a power of two below 2**64 times an odd number, which is never 0: every single
    flip is noticed. Several at once escape with a chance of about 2**-63, the weights being random.
    """
    total: torch.Tensor | None = None
    for words in _words(tensors):
        part = (words * _weights(words.device)[: words.numel()]).sum()
        total = part if total is None else total * _MULTIPLIER + part
    return torch.zeros((), dtype=torch.int64) if total is None else total


def odd_ranks(checksums: Sequence[int], shards: int) -> list[int]:
    """The ranks whose checksum is not that of most ranks which hold the same; all of these where no more than half of them
    agree. Empty where all agree."""
    odd: list[int] = []
    for first in range(shards):
        ranks = range(first, len(checksums), shards)
        value, votes = Counter(checksums[rank] for rank in ranks).most_common(1)[0]
        if votes < len(ranks):
            most_agree = 2 * votes > len(ranks)
            odd += [rank for rank in ranks if not most_agree or checksums[rank] != value]
    return sorted(odd)


def _words(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """All bytes as int64 tensors (n,) of at most the size that is weighed at once. Small tensors are joined: a kernel for each
    would cost more than their sums."""
    waiting: list[torch.Tensor] = []
    waiting_bytes = 0
    for tensor in tensors:
        content = tensor.detach().reshape(-1).view(torch.uint8)
        most = _WORDS[tensor.device.type] * _WORD_BYTES
        for piece in content.split(most):
            if piece.numel() == most and piece.storage_offset() % _WORD_BYTES == 0:
                yield piece.view(torch.int64)  # where it lies
                continue
            if waiting_bytes + piece.numel() > most:
                yield _join(waiting, waiting_bytes)
                waiting, waiting_bytes = [], 0
            waiting.append(piece)
            waiting_bytes += piece.numel()
    if waiting_bytes:
        yield _join(waiting, waiting_bytes)


def _join(pieces: list[torch.Tensor], size: int) -> torch.Tensor:
    filling = -size % _WORD_BYTES
    return torch.cat([*pieces, pieces[0].new_zeros(filling)]).view(torch.int64)


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """(n,) odd int64, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**63), 2**63 - 1, (_WORDS[device.type],), generator=generator)
    return (weights | 1).to(device)
