"""What `lockstep train --debug` adds to an attempt: a look at the first batch, and a watch for what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from data.stream import GlobalStep
from distrib.finite_watch import FiniteWatch
from launch.tables import format_table


@dataclass(frozen=True)
class Debug:
    """How an attempt is looked into."""

    steps: int | None
    """How many steps it takes; None: as many as the recipe has."""
    kept: bool
    """Whether its directory stays when it ends. What does not stay is not saved to."""
    watch: FiniteWatch


def show_first(steps: Iterator[GlobalStep], item_name: str, say: Callable[[str], None]) -> Iterator[GlobalStep]:
    """The same steps; what the first one holds is told before it is handed on."""
    for number, step in enumerate(steps):
        if number == 0:
            say(describe_step(step, item_name))
        yield step


def describe_step(step: GlobalStep, item_name: str) -> str:
    """A step as this rank gets it: samples, items, micro-batches, and the fields of the first of them."""
    first = step.micro_batches[0]
    fields = [("field", "shape", "dtype", "values")]
    fields += [(name, *_describe(tensor)) for name, tensor in first.tensors.items()]
    count = len(step.micro_batches)
    amount = _count(step.samples, step.items, item_name)
    lines = [f"first batch: {amount}, in {count} micro-batch{'es' * (count > 1)} here"]
    for stream in step.streams:
        lines.append(f"  stream {stream.name}: {_count(stream.samples, stream.items, item_name)}")
    return "\n".join([*lines, *(f"  {line}" for line in format_table(fields).splitlines())])


def _count(samples: int, items: int, item_name: str) -> str:
    return f"{samples:,} samples" + (f", {items:,} {item_name}s" if item_name != "sample" else "")


def _describe(tensor: torch.Tensor) -> tuple[str, str, str]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.numel() == 0:
        return str(tuple(tensor.shape)), dtype, "none"
    if tensor.dtype == torch.bool:
        return str(tuple(tensor.shape)), dtype, f"{int(tensor.sum()):,} of {tensor.numel():,} true"
    # In a dtype that every comparison is made for: token ids may be uint16.
    values = tensor.double() if tensor.is_floating_point() else tensor.long()
    return str(tuple(tensor.shape)), dtype, f"{values.min().item():.6g} to {values.max().item():.6g}"
