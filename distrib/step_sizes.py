"""What a step takes on this rank, measured while it runs: the bytes that tensors hold, and what collectives send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distrib.collectives import Collective, CollectiveCounter
from distrib.engine import Engine
from distrib.sharding import local
from distrib.tensor_memory import PeakMemory, storage_bytes


@dataclass(frozen=True)
class StepSizes:
    """Bytes of this rank."""

    parameters: int
    """Held between steps, buffers included."""
    gradients: int
    """Held when the optimizer begins to update."""
    optimizer: int
    """Its state."""
    peak: int
    """The most that all tensors held at once during the step: the above, activations, and whatever is gathered."""
    collectives: dict[Collective, tuple[int, int]]
    """Kind -> calls, and payload: of the whole tensor that is reduced or gathered."""


def measure_step(engine: Engine, step: Callable[[], None]) -> StepSizes:
    """Calls `step()`, which must take one step of an engine whose optimizer works on plain tensors of this rank."""
    sizes: dict[str, int] = {}

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        sizes["gradients"] = storage_bytes(part.grad for group in optimizer.param_groups for part in group["params"])
        sizes["optimizer"] = storage_bytes(value for state in optimizer.state.values() for value in state.values())

    memory = PeakMemory()
    memory.note(_held(engine))
    memory.note(local(tensor) for tensor in engine.canonical_state().tensors.values())
    handle = register_optimizer_step_pre_hook(look)
    try:
        with CollectiveCounter() as counter, memory:
            step()
    finally:
        handle.remove()
    return StepSizes(
        parameters=storage_bytes(_held(engine)),
        gradients=sizes["gradients"],
        optimizer=sizes["optimizer"],
        peak=memory.peak_bytes,
        collectives={kind: (calls, counter.payload_bytes[kind]) for kind, calls in counter.calls.items()},
    )


def _held(engine: Engine) -> Iterator[torch.Tensor]:
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        yield local(tensor.detach())
