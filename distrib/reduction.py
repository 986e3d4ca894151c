"""The few numbers of a step that every rank must agree on, summed in one collective and read one step late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from distrib.engine import StepResult
from distrib.world import World

LIMBS = 4
_LIMB_BITS = 16


@dataclass(frozen=True)
class StepReport:
    """A committed step as the host sees it, the same on every rank."""

    loss_sum: float
    """Sum of losses over the global batch, in nats."""
    fold: int
    """Wrapping 64-bit sum of the folds of all samples that went through forward."""
    stop_requested: bool
    """Whether any rank was asked to stop."""
    data_wait_seconds: float
    """Mean over ranks of the time that the step waited for its batch."""
    gradient_norm: float
    skipped: bool
    learning_rate: float
    stream_loss_sums: tuple[float, ...]
    """The part of `loss_sum` that belongs to each stream; empty where there is only one."""
    vitals: tuple[tuple[float, ...], ...] = ()
    """What each rank told of itself alone, in rank order; empty in steps in which they told nothing."""


class PendingReport:
    """A report on its way; `read` waits for it, and for nothing that was queued on the device after it."""

    def __init__(
        self, vector: torch.Tensor, work: Any | None, learning_rate: float, ranks: int, vital_numbers: int
    ) -> None:
        self._learning_rate = learning_rate
        self._ranks = ranks
        self._vital_numbers = vital_numbers
        self._work = work
        self._vector = vector
        self._copied: torch.cuda.Event | None = None
        if vector.is_cuda:
            if work is not None:
                work.wait()  # of the stream, not of the host
            self._work = None
            self._vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._vector.copy_(vector, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> StepReport:
        if self._work is not None:
            self._work.wait()
        if self._copied is not None:
            self._copied.synchronize()
        loss_sum, norm, skipped, stop, data_wait, *rest = self._vector.tolist()
        count = self._vital_numbers
        told = rest[len(rest) - count * self._ranks :]
        limbs, stream_loss_sums = rest[:LIMBS], rest[LIMBS : len(rest) - len(told)]
        return StepReport(
            loss_sum=loss_sum,
            fold=word_of_limbs(limbs),
            stop_requested=stop > 0,
            data_wait_seconds=data_wait / self._ranks,
            gradient_norm=norm,
            skipped=skipped > 0,
            learning_rate=self._learning_rate,
            stream_loss_sums=tuple(stream_loss_sums),
            vitals=tuple(tuple(told[i : i + count]) for i in range(0, len(told), count)) if count else (),
        )


def limbs_of_word(word: torch.Tensor) -> torch.Tensor:
    """A scalar int64 as `LIMBS` float64 of 16 bits each, on its device: a sum over ranks of one value and zeros is exact."""
    return torch.stack([(word >> (_LIMB_BITS * i)) & (2**_LIMB_BITS - 1) for i in range(LIMBS)]).double()


def word_of_limbs(limbs: Sequence[float]) -> int:
    """The 64-bit number whose limbs, or sums of such limbs modulo 2**64, these are; not negative."""
    return sum(int(limb) << (_LIMB_BITS * i) for i, limb in enumerate(limbs)) & (2**64 - 1)


def report_step(
    result: StepResult,
    *,
    fold: int,
    stop_requested: bool,
    data_wait_seconds: float,
    world: World,
    vitals: torch.Tensor | None = None,
) -> PendingReport:
    """Starts summing a step's numbers over the ranks; returns at once. `vitals`: (n,) float64, numbers of this rank alone for
    all to see, the same n on every rank; None on all of them in most steps.

    The 64-bit fold travels as four 16-bit limbs in float64, whose sums over up to 2**37 ranks are exact. Norm and skip
    are the same on every rank already, so rank 0's alone are sent.
    """
    fold &= 2**64 - 1
    host = [float(stop_requested), data_wait_seconds]
    host += [float((fold >> (_LIMB_BITS * i)) & (2**_LIMB_BITS - 1)) for i in range(LIMBS)]
    device = result.loss_sum.device
    agreed = torch.stack([result.gradient_norm, result.skipped]).double()
    if world.data_rank != 0:
        agreed = torch.zeros_like(agreed)
    # non_blocking: without it the host would wait for the whole step before this copy.
    told = torch.tensor(host, dtype=torch.float64).to(device, non_blocking=True)
    parts = [result.loss_sum.reshape(1), agreed, told]
    if result.stream_loss_sums is not None:
        parts.append(result.stream_loss_sums)
    if vitals is not None:
        # Everybody's numbers have a place in the sum where all others add zero.
        places = torch.zeros(world.data_size, len(vitals), dtype=torch.float64, device=device)
        places[world.data_rank].copy_(vitals, non_blocking=True)
        parts.append(places.flatten())
    vector = torch.cat(parts)
    work = None
    if world.size > 1:
        work = dist.all_reduce(vector, group=world.data_group, async_op=True)
    return PendingReport(vector, work, result.learning_rate, world.data_size, 0 if vitals is None else len(vitals))
