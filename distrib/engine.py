"""The contract between the loop and whatever runs a step: all that the loop knows of parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from distrib.config import OptimizerConfig, ParallelConfig, ScheduleConfig
from distrib.copies import Copies
from distrib.pace import Pace
from distrib.world import World


class LossSum(Protocol):
    """What a task returns for a micro-batch."""

    @property
    def total(self) -> torch.Tensor:
        """Scalar: the sum of the micro-batch's losses, with gradient."""
        ...

    @property
    def per_sample(self) -> torch.Tensor:
        """(n,), detached: the sum of each sample's losses. Needed where the samples are of several streams."""
        ...


class MicroBatch(Protocol):
    """What one forward pass takes."""

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...
    @property
    def first_position(self) -> int: ...
    @property
    def weight(self) -> float:
        """1.0, or 0.0 for a filler that only keeps this rank's collectives matched with the others'."""
        ...

    @property
    def streams(self) -> torch.Tensor | None:
        """(n,) int64: the number, below `stream_count`, of each sample's stream; None where there is only one."""
        ...

    @property
    def stream_count(self) -> int: ...


LossFunction = Callable[[nn.Module, Mapping[str, torch.Tensor]], LossSum]
EvaluationFunction = Callable[[nn.Module, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is built from. The model is made by the engine, so that it can be sharded before its weights exist."""

    make_model: Callable[[], nn.Module]
    loss: LossFunction
    world: World
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    steps: int
    seed: int


@dataclass(frozen=True)
class StepResult:
    """A committed step. The tensors live on the device and are read a step late, so that the step never waits on the host."""

    loss_sum: torch.Tensor
    """Scalar float64: the sum of this rank's losses, in nats."""
    gradient_norm: torch.Tensor
    """Scalar float32: the global L2 norm before clipping, the same on every rank."""
    skipped: torch.Tensor
    """Scalar float32: 1.0 where the gradient was not finite and weights and optimizer stayed as they were."""
    learning_rate: float
    stream_loss_sums: torch.Tensor | None = None
    """(streams,) float64: the part of `loss_sum` that belongs to each stream; None where there is only one."""


@dataclass
class CanonicalState:
    """The engine-free form of everything a step advances: full names, tensors, and scalars that fit JSON."""

    tensors: dict[str, torch.Tensor]
    """`model.{name}` for parameters and buffers, `optimizer.{state}.{name}` for the optimizer's state."""
    scalars: dict[str, Any]


class Engine(Protocol):
    """Runs steps. Built from an `EngineSetup`."""

    @property
    def module(self) -> nn.Module:
        """The model without any wrapper."""
        ...

    @property
    def parameter_count(self) -> int:
        """Scalars of the whole model, trained and frozen; a tied parameter counts once."""
        ...

    @property
    def world(self) -> World: ...
    @property
    def steps_done(self) -> int: ...
    @property
    def pace(self) -> Pace:
        """The time of forward passes that this rank needs for itself."""
        ...

    def dry_run(self, micro_batch: MicroBatch) -> None:
        """Forward, backward and communication of one micro-batch, with nothing kept: memory and compile errors come before
        step 1, and every attempt starts with the same communication buckets."""
        ...

    def step(self, micro_batches: Sequence[MicroBatch], items: int) -> StepResult:
        """Takes one optimizer step on this rank's micro-batches. `items` counts the whole global batch, over all ranks."""
        ...

    def evaluate(self, function: EvaluationFunction, micro_batches: Iterable[MicroBatch]) -> dict[str, torch.Tensor]:
        """Sums of `function` over all micro-batches and ranks, with the model in evaluation mode; disturbs nothing."""
        ...

    def copies(self) -> Copies | None:
        """What other ranks must hold just as this one does after every step; None where there is nothing such."""
        ...

    def canonical_state(self) -> CanonicalState:
        """Every rank calls it together. The tensors are what the engine trains, or copies of it."""
        ...

    def load_state(self, state: CanonicalState) -> None:
        """Takes over a checkpoint: the tensors that `canonical_state()` gave, with the checkpoint's values read into them in
        place, and the checkpoint's scalars. Every rank calls it together."""
        ...
