"""What each engine holds per rank and sends per step, as formulas: for a reader, for a planner, and for the benchmark that
measures them. Imports no torch.

P is the number of the model's parameter elements, each an fp32 master weight of 4 bytes. Padding, scalars and activations are
left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distrib.capabilities import count_shards
from distrib.config import OptimizerConfig, ParallelConfig
from distrib.deepspeed_config import make_deepspeed_config

_FP32_BYTES = 4
# DeepSpeed's default for stage3_max_live_parameters and stage3_max_reuse_distance.
_DEEPSPEED_LIVE_ELEMENTS = 10**9


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank."""

    parameters: float
    """Held between steps."""
    gradients: float
    """Held when the optimizer begins to update, with the buffers that an engine keeps for them."""
    optimizer: float
    """Its moments."""
    traffic: dict[str, float]
    """Collective -> payload of a step: of the whole tensor that is reduced or gathered."""


@dataclass(frozen=True)
class _Case:
    """What the formulas are about."""

    parallel: ParallelConfig
    optimizer: OptimizerConfig
    sizes: Sequence[int]
    """Elements of each parameter, in the model's order."""
    world_size: int
    micro_batches: int

    @property
    def whole_bytes(self) -> float:
        """4P."""
        return _FP32_BYTES * sum(self.sizes)

    @property
    def moments(self) -> int:
        """Tensors of the model's size that the optimizer keeps."""
        if self.optimizer.kind == "adamw":
            return 2
        return 1 if self.optimizer.momentum > 0 else 0


def footprint(
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    *,
    parameter_sizes: Sequence[int],
    world_size: int,
    micro_batches: int = 1,
) -> Footprint:
    """The formulas of the engine that `parallel` names, for a model whose parameters have so many elements each."""
    return _FORMULAS[parallel.engine](_Case(parallel, optimizer, parameter_sizes, world_size, micro_batches))


def _replicated(case: _Case) -> Footprint:
    """4P + 4P + 4P for each moment; one all-reduce of 4P a step."""
    whole = case.whole_bytes
    return Footprint(whole, whole, case.moments * whole, {"allreduce": whole} if case.world_size > 1 else {})


def _native(case: _Case) -> Footprint:
    """Sharded over S of the ranks: what replication holds divided by S at every stage, since FSDP2 keeps no whole weights
    between steps; see `distrib.sharding` for what it sends."""
    stage = case.parallel.zero_stage
    if stage == 0 or case.world_size == 1:
        return _replicated(case)
    shards = count_shards(case.parallel, case.world_size)
    part = case.whole_bytes / shards
    gathers = 2 * case.micro_batches if stage == 3 else 1
    reductions = 1 if stage == 1 else case.micro_batches
    traffic = {"allgather": gathers * case.whole_bytes, "reduce_scatter": reductions * case.whole_bytes}
    if shards < case.world_size:
        traffic["allreduce"] = part
    return Footprint(part, part, case.moments * part, traffic)


def _deepspeed(case: _Case) -> Footprint:
    """Stages 1 and 2: whole weights and a copy of the part that this rank updates; this rank's part of the gradient twice,
    flat and as it was received, where a parameter that the part's border cuts is held whole. The gradient is all-reduced
    and the updated weights are gathered: 3P elements moved, the paper's 2P.

    Stage 3: this rank's part of the weights and the copy that is updated; two of the gradient, and one bucket. Weights are
    gathered once per micro-batch where all of them may stay until the backward pass, and twice where not.
    """
    stage, ranks, whole = case.parallel.zero_stage, case.world_size, case.whole_bytes
    if stage == 0:
        return _replicated(case)
    zero = make_deepspeed_config(case.parallel, case.optimizer, sum(case.sizes))["zero_optimization"]
    part = whole / ranks
    moments = case.moments * part
    if stage < 3:
        gradients = 2 * part + _FP32_BYTES * _largest_overhang(case.sizes, ranks)
        reductions = 1 if stage == 1 else case.micro_batches
        return Footprint(whole + part, gradients, moments, {"allreduce": reductions * whole, "allgather": whole})
    limits = (
        zero.get(key, _DEEPSPEED_LIVE_ELEMENTS) for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance")
    )
    gathers = case.micro_batches * (1 if sum(case.sizes) <= min(limits) else 2)
    gradients = 2 * part + _FP32_BYTES * zero["reduce_bucket_size"]
    traffic = {"allgather": gathers * whole, "reduce_scatter": case.micro_batches * whole}
    return Footprint(2 * part, gradients, moments, traffic)


def _largest_overhang(sizes: Sequence[int], ranks: int) -> int:
    """Elements of cut parameters that lie outside a rank's part of all of them in a row, on the rank that has the most."""
    ends = list(itertools.accumulate(sizes))
    part = math.ceil(ends[-1] / ranks)

    def overhang(first: int, last: int) -> int:
        touched = [
            (end - size, end) for size, end in zip(sizes, ends, strict=True) if end > first and end - size < last
        ]
        return sum(max(0, first - start) + max(0, end - last) for start, end in touched)

    return max(overhang(rank * part, min((rank + 1) * part, ends[-1])) for rank in range(ranks))


_FORMULAS: dict[str, Callable[[_Case], Footprint]] = {
    "native": _native,
    "deepspeed": _deepspeed,
    "accelerate": _replicated,
}
