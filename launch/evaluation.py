"""Evaluation on the validation split: of every stream of a mixture on its own, and of all together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from data.samples import Dataset
from data.stream import MicroBatch, evaluation_batches
from distrib.world import World
from models.tasks import Task

Sums = dict[str, torch.Tensor]


def evaluate_streams(
    validation: Mapping[str, Dataset],
    task: Task,
    sum_up: Callable[[Iterator[MicroBatch]], Sums],
    *,
    world: World,
    micro_samples: int,
    samples: int | None,
) -> dict[str, float]:
    """The task's metrics over the validation data, `samples` of each stream (None: all); `sum_up` runs the model.

    Where there are several streams, `<name>/<metric>` are each stream's own.
    """
    totals: Sums = {}
    by_stream: dict[str, float] = {}
    for stream, dataset in validation.items():
        batches = evaluation_batches(
            dataset,
            rank=world.data_rank,
            world_size=world.data_size,
            micro_samples=micro_samples,
            samples=samples,
        )
        sums = sum_up(batches)
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value
        if len(validation) > 1:
            by_stream |= {f"{stream}/{name}": value for name, value in task.summarise(sums).items()}
    return task.summarise(totals) | by_stream
