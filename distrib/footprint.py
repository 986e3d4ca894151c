"""What each engine holds per rank and sends per step, as formulas: for a reader, for a planner, and for the benchmark that
measures them. Imports no torch.

P is the number of the model's parameter elements, each an fp32 master weight of 4 bytes. Padding, scalars and activations are
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distrib.capabilities import count_shards
from distrib.config import OptimizerConfig, ParallelConfig

_FP32_BYTES = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank."""

    parameters: float
    """Held between steps."""
    gradients: float
    """Held when the optimizer begins to update."""
    optimizer: float
    """Its moments."""
    traffic: dict[str, float]
    """Collective -> payload of a step: of the whole tensor that is reduced or gathered."""


def footprint(
    parallel: ParallelConfig, optimizer: OptimizerConfig, *, parameters: int, world_size: int, micro_batches: int = 1
) -> Footprint:
    """The formulas of the engine that `parallel` names, for a model of so many parameter elements."""
    whole = _FP32_BYTES * parameters
    moments = _moments(optimizer)
    return _FORMULAS[parallel.engine](parallel, whole, moments, world_size, micro_batches)


def _native(parallel: ParallelConfig, whole: float, moments: int, world_size: int, micro_batches: int) -> Footprint:
    """Replicated: 4P + 4P + 4P per moment, one all-reduce of 4P a step. Sharded over S of the ranks: all of it divided by S
    at every stage, since FSDP2 keeps no whole weights between steps; see `distrib.sharding` for what it sends."""
    shards = count_shards(parallel, world_size)
    if parallel.zero_stage == 0 or world_size == 1:
        return Footprint(whole, whole, moments * whole, {"allreduce": whole} if world_size > 1 else {})
    part = whole / shards
    gathers = 2 * micro_batches if parallel.zero_stage == 3 else 1
    reductions = 1 if parallel.zero_stage == 1 else micro_batches
    traffic = {"allgather": gathers * whole, "reduce_scatter": reductions * whole}
    if shards < world_size:
        traffic["allreduce"] = part
    return Footprint(part, part, moments * part, traffic)


_FORMULAS: dict[str, Callable[[ParallelConfig, float, int, int, int], Footprint]] = {"native": _native}


def _moments(optimizer: OptimizerConfig) -> int:
    """Tensors of the model's size that the optimizer keeps."""
    if optimizer.kind == "adamw":
        return 2
    return 1 if optimizer.momentum > 0 else 0
