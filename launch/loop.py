"""The training loop. A step: take this rank's part of the next global batch, run it, commit it, tell about it.

Numbers of a step are read one step late, so that the device is never waited for; they are all in before anything is
saved or evaluated.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from data.stream import GlobalStep
from distrib.engine import Engine
from distrib.phases import enter
from distrib.reduction import PendingReport, report_step
from distrib.world import World
from launch.ledger import Ledger
from launch.meter import Meter


@dataclass
class Hooks:
    """What the loop calls at step boundaries. Every rank calls the same ones in the same order."""

    record: Callable[[dict[str, Any]], None]
    """A committed step's line."""
    evaluate: Callable[[], None]
    save: Callable[[], None]
    stop_asked: Callable[[], bool]
    """Whether this rank was asked to stop; the ranks then agree."""
    vitals: Callable[[float], torch.Tensor | None]
    """What this rank, which has waited so many seconds for the step's data, tells the others of its health; None in most steps,
    on all ranks alike."""


@dataclass(frozen=True)
class Intervals:
    """When to do more than a step; None: never on the way."""

    save_every_steps: int | None
    evaluate_every_steps: int | None

    def save_due(self, step: int) -> bool:
        return self.save_every_steps is not None and step % self.save_every_steps == 0

    def evaluate_due(self, step: int) -> bool:
        return self.evaluate_every_steps is not None and step % self.evaluate_every_steps == 0


class _Flight(NamedTuple):
    """A step that was run and whose numbers are on their way."""

    batch: GlobalStep
    report: PendingReport
    cost: dict[str, float | int | None]


def train(
    engine: Engine,
    stream: Iterator[GlobalStep],
    ledger: Ledger,
    *,
    world: World,
    meter: Meter,
    intervals: Intervals,
    hooks: Hooks,
) -> None:
    """Runs until the stream ends or the ranks agree to stop; then everything is committed, and a save was asked for."""
    first_step = engine.steps_done
    in_flight: deque[_Flight] = deque()
    stop = False

    def commit_oldest() -> None:
        nonlocal stop
        flight = in_flight.popleft()
        enter("report")
        report = flight.report.read()
        ledger.commit(samples=flight.batch.samples, items=flight.batch.items, fold=report.fold, skipped=report.skipped)
        stop = stop or report.stop_requested
        hooks.record(
            {
                "step": ledger.step,
                "samples": ledger.position,
                "items": ledger.items,
                "loss": report.loss_sum / flight.batch.items,
                "lr": report.learning_rate,
                "gradient_norm": report.gradient_norm,
                "data_wait_seconds": report.data_wait_seconds,
                "skipped": report.skipped,
                "digest": ledger.digest,
                "vitals": report.vitals,
                **flight.cost,
                **_by_stream(flight.batch, report.stream_loss_sums),
            }
        )

    meter.restart()
    while not stop:
        enter("data", engine.steps_done)
        asked_for_data = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            break
        data_wait_seconds = time.perf_counter() - asked_for_data

        result = engine.step(batch.micro_batches, batch.items)
        report = report_step(
            result,
            fold=batch.fold,
            stop_requested=hooks.stop_asked(),
            data_wait_seconds=data_wait_seconds,
            vitals=hooks.vitals(data_wait_seconds),
            world=world,
        )
        in_flight.append(_Flight(batch, report, meter.measure(batch.items)))

        step = engine.steps_done
        save_due, evaluate_due = intervals.save_due(step), intervals.evaluate_due(step)
        while len(in_flight) > (0 if save_due or evaluate_due else 1):
            commit_oldest()
        if evaluate_due:
            hooks.evaluate()
        if save_due:
            hooks.save()
        if save_due or evaluate_due:
            meter.restart()

    while in_flight:
        commit_oldest()
    if ledger.step > first_step and not intervals.save_due(ledger.step):
        hooks.save()


def _by_stream(batch: GlobalStep, loss_sums: tuple[float, ...]) -> dict[str, Any]:
    """What a mixture's streams gave to a step: share of its samples, epochs given so far, mean loss of its items."""
    if not batch.streams:
        return {}
    return {
        "streams": {
            stream.name: {
                "share": stream.samples / batch.samples,
                "epoch": stream.epochs,
                "loss": loss_sums[stream.number] / stream.items if stream.items else None,
            }
            for stream in batch.streams
        }
    }
