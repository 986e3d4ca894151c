"""A run's numbers: every record into `metrics.jsonl`, and on to Weights & Biases and TensorBoard."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

from launch.tracking.config import TrackingConfig
from launch.tracking.metrics_file import STALL_KEY, MetricsFile
from launch.tracking.tracker_process import TrackerProcess


class Tracking:
    """Made on rank 0 only. `recipe` is the resolved recipe, for W&B to show; `problems` says what failed, once each.

    Raises ValueError only where `metrics.jsonl` cannot be written. A W&B or TensorBoard that fails, hangs or is slow
    costs one line on stderr, never a step.
    """

    def __init__(
        self, config: TrackingConfig, run_directory: Path, *, run_name: str, wandb_run_id: str, recipe: dict[str, Any]
    ) -> None:
        self.problems: list[str] = []
        self._every_steps = config.every_steps
        self._metrics = MetricsFile(run_directory)
        self._trackers: list[TrackerProcess] = []
        self._wandb: TrackerProcess | None = None
        root = run_directory.resolve()
        if config.wandb != "off":
            header = {
                "mode": config.wandb,
                "directory": str(root),
                "project": config.wandb_project,
                "entity": config.wandb_entity,
                "name": run_name,
                "run_id": wandb_run_id,
                "recipe": recipe,
                "trainer_pid": os.getpid(),
            }
            self._wandb = self._start("wandb", "W&B", header, root)
        if config.tensorboard:
            self._start("tensorboard", "TensorBoard", {"directory": str(root / "tensorboard")}, root)

    @property
    def wandb_url(self) -> str | None:
        """The run's page, once W&B is online; None before, offline and without it."""
        return self._wandb.url if self._wandb is not None else None

    def log(self, record: dict[str, Any]) -> None:
        """Record a step, an evaluation or the wait for a save. Only numbers go to the trackers."""
        self._metrics.append(record)
        rare = "evaluation" in record or STALL_KEY in record
        if self._trackers and (rare or record["step"] % self._every_steps == 0):
            numbers = _numbers(record)
            for tracker in self._trackers:
                tracker.log(numbers)

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Flush everything. Takes at most `timeout_seconds`: a tracker that hangs is killed then, with a warning."""
        self._metrics.close()
        deadline = time.monotonic() + timeout_seconds
        for tracker in self._trackers:
            tracker.end()
        for tracker in self._trackers:
            tracker.join(max(0.0, deadline - time.monotonic()))

    def _start(
        self, kind: Literal["wandb", "tensorboard"], name: str, header: dict[str, Any], root: Path
    ) -> TrackerProcess:
        tracker = TrackerProcess(kind, name, header, root / "logs" / f"{kind}.log", self._problem)
        self._trackers.append(tracker)
        return tracker

    def _problem(self, sentence: str) -> None:
        self.problems.append(sentence)
        print(f"lockstep: warning: {sentence}", file=sys.stderr, flush=True)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record, an evaluation's as `evaluation/<name>` and those of a mixture's stream as
    `streams/<stream>/<name>`; True and False as 1 and 0, to be drawn."""
    if "evaluation" in record:
        record = {"step": record["step"]} | {
            f"evaluation/{name}": value for name, value in record["evaluation"].items()
        }
    for stream, given in record.get("streams", {}).items():
        record = record | {f"streams/{stream}/{name}": value for name, value in given.items()}
    return {
        name: int(value) if isinstance(value, bool) else value
        for name, value in record.items()
        if isinstance(value, int | float)
    }
