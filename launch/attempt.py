"""One attempt at a run: what it works with, and what it does at step boundaries."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.plan import Plan
from data.steps import samples_of_step
from distrib.engine import Engine
from distrib.phases import enter
from distrib.saving import SaveOutcome, Saver
from distrib.world import World
from launch.clock import Clock
from launch.config import RunConfig
from launch.console import Progress
from launch.debug import Debug
from launch.ending import Ending
from launch.evaluation import evaluate_streams
from launch.exit_codes import DO_NOT_RESTART, RunEnded
from launch.feed import Feed
from launch.health import Health
from launch.ledger import Ledger
from launch.materials import Materials
from launch.recipe import hash_recipe
from launch.run_directory import RunDirectory
from launch.stopping import StopRequest
from launch.tracking.metrics_file import STALL_KEY
from launch.tracking.tracking import Tracking

log = logging.getLogger("lockstep")
# How long a run that fails waits for the save in flight: longer only where the state of a rank is very large.
_LAST_SAVE_SECONDS = 60.0


@dataclass
class Attempt:
    """Everything an attempt works with. Parts that only rank 0 has are None on the others."""

    config: RunConfig
    world: World
    run: RunDirectory
    materials: Materials
    engine: Engine
    plan: Plan
    ledger: Ledger
    stop: StopRequest
    feed: Feed
    clock: Clock
    debug: Debug | None = None
    progress: Progress | None = None
    tracking: Tracking | None = None
    resumed_from: Path | None = None
    saver: Saver = field(init=False)
    health: Health = field(init=False)
    last_step: int = field(init=False)
    """The step that this attempt ends after."""
    saved_step: int | None = None
    """The last step whose checkpoint is known to be published."""
    save_failure: str | None = None
    """Why the last save failed, if it did."""
    stop_reason: str | None = None
    """Why it stops early, where that is its own decision."""
    checkpoint_stalls: list[float] = field(default_factory=list)
    """Seconds that training waited, for every save."""
    evaluated_step: int | None = None
    first_evaluation: dict[str, float] | None = None
    last_evaluation: dict[str, float] | None = None

    def __post_init__(self) -> None:
        self.saver = Saver(self.world, self.config.checkpoint, self._tell_save)
        self.health = Health(
            self.config.health, self.engine, samples=self._samples_of_last_step, saved_step=self._newest_saved_step
        )
        self.last_step = self.config.run.steps

    @property
    def kept(self) -> bool:
        """Whether the run's directory stays when the attempt ends."""
        return self.debug is None or self.debug.kept

    def say(self, text: str) -> None:
        """A line for the person who watches; rank 0 speaks, every rank logs."""
        log.info("%s", text)
        if self.progress is not None:
            self.progress.message(text)
        elif self.world.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def record(self, record: dict[str, Any]) -> None:
        """Writes a committed step's line, and shows it. Raises RunEnded where the run must not go on after it."""
        items, vitals = record.pop("items"), record.pop("vitals")
        findings = self.health.judge(record, vitals, self.ledger)
        record = {
            "step": record.pop("step"),
            "attempt": self.run.attempt,
            "samples": record.pop("samples"),
            "tokens": items if self.materials.item_name == "token" else None,
            **record,
            **findings.columns,
        }
        if self.tracking is not None and self.progress is not None:
            self._track(record)
            self.progress.update(record)
        for warning in findings.warnings:
            self.say(warning)
        if findings.ending is not None:
            raise findings.ending
        if findings.stop is not None:
            self.stop_reason = findings.stop
            self.stop.ask()

    def _samples_of_last_step(self) -> list[str]:
        """The ids of the samples that the last committed step read, as STREAM:ID in a mixture."""
        training = self.materials.training
        shards = [training[s.name].shard_samples if s.name in training else None for s in self.plan.streams]
        samples = samples_of_step(self.plan, shards, self.ledger.position)
        return [f"{stream}:{sample}" if stream else str(sample) for stream, sample in samples]

    def evaluate(self) -> None:
        """Evaluates on the validation split, on all ranks, and records the metrics."""
        enter("evaluate", self.ledger.step)
        task = self.materials.task
        metrics = evaluate_streams(
            self.materials.validation,
            task,
            lambda batches: self.engine.evaluate(task.evaluate, batches),
            world=self.world,
            micro_samples=self.config.batch.micro_samples,
            samples=self.config.evaluation.samples,
        )
        self.evaluated_step = self.ledger.step
        self.first_evaluation = self.first_evaluation or metrics
        self.last_evaluation = metrics
        if self.tracking is not None:
            self._track({"step": self.ledger.step, "attempt": self.run.attempt, "evaluation": metrics})
        self.say(f"evaluation after step {self.ledger.step}: {format_metrics(metrics)}")

    def save(self) -> None:
        """Begins to save the last committed step, once the save before is finished."""
        if not self.kept:
            return
        enter("save", self.ledger.step)
        begun = time.perf_counter()
        self.finish_save()
        state = self.engine.canonical_state()
        refusal = self.health.why_not_to_save(state, self.ledger.step)
        if refusal is not None:
            self.save_failure = refusal
            self.say(f"checkpoint of step {self.ledger.step} not saved: {refusal}")
            return
        self.saver.begin(
            self.run.checkpoints,
            state,
            step=self.ledger.step,
            scalars={
                "ledger": self.ledger.as_scalars(),
                "health": self.health.as_scalars(),
                "plan": json.loads(self.plan.to_json()),
                "first_evaluation": self.first_evaluation,
                "parts": self.feed.parts_at(self.ledger.position),
            },
            fields={
                "world": self.world.size,
                "engine": self.config.parallel.engine,
                "position": self.ledger.position,
                "digest": self.ledger.digest,
                "plan": self.plan.hash,
                "recipe": hash_recipe(self.config),
                "resolved_recipe": self.config.model_dump(mode="json"),
                "wandb_run_id": self.run.identity["wandb_run_id"],
            },
        )
        if not self.config.checkpoint.asynchronous:
            self.finish_save()
        stall_seconds = time.perf_counter() - begun
        log.info("checkpoint of step %d: training waited %.3f s", self.ledger.step, stall_seconds)
        self.checkpoint_stalls.append(stall_seconds)
        if self.tracking is not None:
            self._track({"step": self.ledger.step, "attempt": self.run.attempt, STALL_KEY: stall_seconds})

    def finish_save(self) -> None:
        """Waits for the save in flight. Here the ranks learn how it ended; a failure fails the run only at its end."""
        outcome = self.saver.finish()
        if outcome is not None:
            self.save_failure = outcome.failure
            self.saved_step = self.saved_step if outcome.failure else outcome.step

    def _newest_saved_step(self) -> int | None:
        self.finish_save()
        return self.saved_step

    def abandon_save(self, ending: Ending, *, at_once: bool) -> None:
        """Lets a save in flight come to its end where this run fails: all that it needs is there, unless a worker is gone."""
        wait_seconds = 0.0 if at_once or ending.peer_lost else _LAST_SAVE_SECONDS
        if not self.saver.abandon(wait_seconds):
            log.warning("a checkpoint was still being written; the one before is the newest")

    def _tell_save(self, outcome: SaveOutcome) -> None:
        if outcome.failure is None:
            log.info("checkpoint of step %d: saved in %.3f s", outcome.step, outcome.seconds)
        else:
            self.say(f"checkpoint of step {outcome.step} not saved: {outcome.failure}")

    def _track(self, record: dict[str, Any]) -> None:
        assert self.tracking is not None
        try:
            self.tracking.log(record | {"clock": self.clock.read()})
        except ValueError as error:
            # metrics.jsonl is the truth about the run: without it the run must not go on.
            raise RunEnded(str(error), DO_NOT_RESTART) from None


def format_metrics(metrics: dict[str, float]) -> str:
    """`name value` pairs as a person reads them: counts whole, everything else to four digits."""
    return ", ".join(
        f"{name} {value:,.0f}" if value.is_integer() and value >= 1000 else f"{name} {value:.4g}"
        for name, value in metrics.items()
    )
