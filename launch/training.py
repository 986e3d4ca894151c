"""From a recipe to a finished run: prepare, set up, resume, train, and tell how it ended."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from data.addresses import is_remote
from data.naming import all_is_there
from data.plan import Plan
from data.stream import evaluation_batches
from distrib.checkpoint import Checkpoint, load_tensors, newest_good_checkpoint, open_checkpoint
from distrib.engine import CanonicalState, EngineSetup
from distrib.engines import make_engine
from distrib.manifest import remove_temporaries, write_durably
from distrib.phases import enter, hold, observe
from distrib.probes import device_name
from distrib.world import World
from launch import loop
from launch.attempt import Attempt
from launch.clock import Clock
from launch.config import RunConfig
from launch.console import Progress
from launch.debug import Debug, show_first
from launch.disk_checks import places_in_use
from launch.ending import Ending, ending_of_failure, ending_of_run, leave_post_mortem, write_outcome
from launch.examination import look_before_training
from launch.exit_codes import DO_NOT_RESTART, USAGE, RunEnded
from launch.feed import make_feed
from launch.ledger import Ledger
from launch.materials import Materials, open_materials
from launch.meter import Meter
from launch.planning import PLAN_FILE, continue_plan, plan_file_bytes, segment_of
from launch.recipe import dump_recipe, parse_recipe
from launch.resume import refuse_impossible_changes
from launch.run_directory import (
    NONE_VERIFIES,
    Resume,
    RunDirectory,
    begin_attempt,
    claim,
    describe_environment,
    ever_checkpointed,
)
from launch.stopping import StopRequest
from launch.streams import open_streams
from launch.summary import tell_summary
from launch.supervised import Supervised
from launch.together import on_rank_zero, together
from launch.tracking.metrics_file import END_KEY, MetricsFile
from launch.tracking.tracking import Tracking
from launch.worker_log import start_logging
from models.flops import FLOP_CONVENTION, peak_flops, training_flops_per_sample

log = logging.getLogger("lockstep")
_PRECISION_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DRY_SAMPLES_ON_CPU = 2  # BatchNorm refuses to train on a single value per channel


def run_attempt(
    config: RunConfig,
    resume: Resume,
    *,
    allow_change: bool,
    world: World,
    stop: StopRequest,
    supervised: Supervised | None = None,
    debug: Debug | None = None,
) -> tuple[Ending, RunDirectory]:
    """Trains until the last step or a request to stop. Every rank of the run calls it.

    Raises what ended the attempt early, after `outcome.json` and `post-mortem.json` say so.
    """
    begun = time.monotonic()
    clock = Clock(sees_waiting=world.size > 1 and world.device.type == "cpu")
    if world.rank == 0:
        observe(clock.hear)
    told = supervised is not None or not resume.begins_anew
    on_rank_zero(world, lambda: all_is_there(config.data) or open_streams(config.data, tell_changes=not told))
    materials = together(world, lambda: open_materials(config, open_streams(config.data)))
    restarted = supervised is not None and supervised.restarts > 0
    claimed = on_rank_zero(world, lambda: claim(config, resume, restarted=restarted))
    path, identity = world.broadcast_object((claimed.path, claimed.identity) if claimed else None)
    run = claimed or RunDirectory(path, identity)
    if supervised is not None and claimed is not None:
        supervised.name_run(run.path)
    start_logging(run.path, world.rank)
    attempt: Attempt | None = None
    try:
        if config.health.preflight != "none":
            look_before_training(world, places_in_use(run.path, config.data), config.health.preflight)
        attempt = together(world, lambda: _set_up(config, world, run, materials, stop, clock, debug))
        _resume(attempt, resume, allow_change=allow_change)
        nodes = len({*world.gather_objects(platform.node())})
        data_lines = together(world, lambda: _check_plan(attempt, nodes))
        _begin(attempt)
        for line in data_lines:
            attempt.say(line)
        _train(attempt)
        ending = ending_of_run(
            attempt.ledger.step, attempt.last_step, attempt.saved_step, attempt.save_failure, attempt.stop_reason
        )
    except BaseException as error:
        ending = ending_of_failure(error)
        log.error("%s", ending.reason, exc_info=not ending.expected)
        leave_post_mortem(run, ending, error, rank=world.rank, supervised=supervised is not None)
        if attempt is not None:
            attempt.abandon_save(ending, at_once=isinstance(error, KeyboardInterrupt))
        raise
    finally:
        _close(attempt)
        step = attempt.ledger.step if attempt is not None else 0
        seconds = time.monotonic() - begun
        write_outcome(run, ending, rank=world.rank, step=step, seconds=seconds, supervised=supervised is not None)
        run.close()
    return ending, run


def _set_up(
    config: RunConfig,
    world: World,
    run: RunDirectory,
    materials: Materials,
    stop: StopRequest,
    clock: Clock,
    debug: Debug | None,
) -> Attempt:
    """Builds model and engine, and the plan of a run that starts afresh."""
    if config.run.deterministic:
        torch.use_deterministic_algorithms(True)
    engine = make_engine(
        EngineSetup(
            materials.make_model,
            materials.task.loss if debug is None else debug.watch.wrap(materials.task.loss),
            world,
            optimizer=config.optimizer,
            schedule=config.schedule,
            parallel=config.parallel,
            steps=config.run.steps,
            seed=config.run.seed,
        )
    )
    if debug is not None:
        debug.watch.watch(engine.module)
    plan = Plan.of([segment_of(config, materials.sources)])
    feed = make_feed(config, materials, world)
    return Attempt(config, world, run, materials, engine, plan, Ledger(), stop, feed, clock, debug)


def _resume(attempt: Attempt, resume: Resume, *, allow_change: bool) -> None:
    """Takes over the newest good checkpoint, or the one that was named. Without one the run starts afresh."""
    world, run = attempt.world, attempt.run
    enter("load")
    on_rank_zero(world, lambda: remove_temporaries(run.checkpoints))
    checkpoint: Checkpoint | None = None
    if resume.checkpoint is not None:
        named = resume.checkpoint
        checkpoint = together(world, lambda: open_checkpoint(named, world))
    elif resume.from_newest:
        existed = world.broadcast_object(ever_checkpointed(run.path))
        checkpoint, passed_over = together(world, lambda: newest_good_checkpoint(run.checkpoints, world))
        for bad in passed_over:
            attempt.say(f"passed over a checkpoint: {bad.reason}; kept as {bad.path.name}")
        if checkpoint is None and existed:
            raise RunEnded(
                f"{run.checkpoints}: {NONE_VERIFIES}",
                DO_NOT_RESTART,
                told_by_all=True,
            )
        if checkpoint is None and run.forked_from is not None:
            raise RunEnded(
                f"{run.path}: began from {run.forked_from} and was ended before it saved anything of its own; "
                f"start again from there with --resume {shlex.quote(run.forked_from)} and a new run.directory",
                DO_NOT_RESTART,
                told_by_all=True,
            )
    if checkpoint is not None:
        taken = checkpoint
        together(world, lambda: _take_over(attempt, taken, allow_change=allow_change))
    if attempt.debug is not None and attempt.ledger.step >= attempt.last_step:
        done = f"has done all {attempt.last_step} steps, and nothing is left to look into; raise run.steps"
        raise RunEnded(f"--resume: {checkpoint.path if checkpoint else run.path} {done}", USAGE, told_by_all=True)
    if attempt.debug is not None and attempt.debug.steps is not None:
        attempt.last_step = min(attempt.last_step, attempt.ledger.step + attempt.debug.steps)
    enter("start", attempt.ledger.step)


def _take_over(attempt: Attempt, checkpoint: Checkpoint, *, allow_change: bool) -> None:
    config, engine = attempt.config, attempt.engine
    for difference in _recipe_changes(config, checkpoint, allow_change=allow_change):
        attempt.say(f"changed since the checkpoint: {difference}")
    engine_scalars = checkpoint.scalars["engine"]
    if config.run.steps < engine_scalars["steps_done"]:
        raise ValueError(
            f"run.steps={config.run.steps}: {checkpoint.path} has done {engine_scalars['steps_done']} already; "
            "raise run.steps, or resume from an earlier checkpoint"
        )
    tensors = engine.canonical_state().tensors
    load_tensors(checkpoint, tensors, attempt.world)
    engine.load_state(CanonicalState(tensors, engine_scalars))
    attempt.ledger = Ledger(**checkpoint.scalars["ledger"])
    plan = Plan.from_json(json.dumps(checkpoint.scalars["plan"]))
    wanted = segment_of(config, attempt.materials.sources, start_position=attempt.ledger.position)
    attempt.plan = continue_plan(plan, wanted, checkpoint.path)
    attempt.resumed_from, attempt.saved_step = checkpoint.path, attempt.ledger.step
    attempt.first_evaluation = checkpoint.scalars["first_evaluation"]
    attempt.health.load_scalars(checkpoint.scalars["health"])
    for line in attempt.feed.take_over(checkpoint.scalars["parts"], checkpoint.path, allow_change=allow_change):
        attempt.say(line)


def _recipe_changes(config: RunConfig, checkpoint: Checkpoint, *, allow_change: bool) -> list[str]:
    """How the recipe differs from the one that a checkpoint was trained with, wherever it lies now."""
    source = f"{checkpoint.path}: resolved_recipe"
    if "resolved_recipe" not in checkpoint.manifest:
        raise ValueError(f"{source}: missing; only what `lockstep train` saved can be resumed")
    before = parse_recipe(checkpoint.manifest["resolved_recipe"], source)
    return refuse_impossible_changes(before, config, allow_change=allow_change)


def _check_plan(attempt: Attempt, nodes: int) -> list[str]:
    """What the run will read of each stream, and fetch to each of so many nodes. Raises ValueError where it cannot or
    may not."""
    return attempt.feed.check(attempt.plan, attempt.ledger.position, _stop_position(attempt), attempt.last_step, nodes)


def _stop_position(attempt: Attempt) -> int:
    remaining_steps = attempt.last_step - attempt.ledger.step
    return attempt.ledger.position + remaining_steps * attempt.config.batch.global_samples


def _begin(attempt: Attempt) -> None:
    """Puts the attempt on record before its first step, and opens what rank 0 speaks through."""
    config, world, run = attempt.config, attempt.world, attempt.run
    devices = world.gather_objects(device_name(world.device))

    def put_on_record() -> None:
        write_durably(run.path / "recipe.yaml", dump_recipe(config).encode())
        run.write_json("environment.json", describe_environment(devices, world.size))
        begin_attempt(
            run,
            world_size=world.size,
            engine=config.parallel.engine,
            device=devices[0],
            resumed_from=str(attempt.resumed_from) if attempt.resumed_from else None,
            resumed_from_step=attempt.saved_step,
            resumed_from_position=attempt.ledger.position if attempt.resumed_from else None,
            resumed_from_digest=attempt.ledger.digest if attempt.resumed_from else None,
            plan=attempt.plan.hash,
            datasets={
                name: {"directory": _lasting(dataset.address), "fingerprint": dataset.fingerprint}
                for name, dataset in attempt.materials.training.items()
            },
            time=attempt.clock.stamps(),
        )
        # After run.json: until this attempt's plan is there, the one before still tells all steps that count.
        write_durably(run.path / PLAN_FILE, plan_file_bytes(attempt.plan))
        attempt.stop.watch(run.stop_file)
        attempt.progress = Progress(
            config.tracking.progress,
            attempt.last_step,
            attempt.ledger.step + 1,
            attempt.materials.item_name,
            interval_seconds=config.tracking.progress_seconds,
        )
        attempt.tracking = Tracking(
            config.tracking,
            run.path,
            run_name=run.identity["name"],
            wandb_run_id=run.identity["wandb_run_id"],
            recipe=config.model_dump(mode="json"),
        )

    on_rank_zero(world, put_on_record)
    run.identity = world.broadcast_object(run.identity)
    origin = f", resumed from step {attempt.saved_step}" if attempt.resumed_from else ""
    attempt.say(f"run {run.path}, attempt {run.attempt}: {world.size} x {devices[0]}{origin}")


def _train(attempt: Attempt) -> None:
    """The dry run, the evaluations before and after, and the loop between them."""
    config, world, ledger = attempt.config, attempt.world, attempt.ledger
    remaining_samples = (attempt.last_step - ledger.step) * config.batch.global_samples
    meter = _make_meter(attempt)
    if remaining_samples:
        with hold("start"):
            attempt.engine.dry_run(_example_micro_batch(attempt))
    if ledger.step == 0:
        attempt.evaluate()
    stream = attempt.feed.open(attempt.plan, ledger.position, _stop_position(attempt))
    attempt.health.watch_data(stream.making_time)
    steps = iter(stream)
    if attempt.debug is not None:
        steps = show_first(steps, attempt.materials.item_name, attempt.say)
    try:
        loop.train(
            attempt.engine,
            steps,
            ledger,
            world=world,
            meter=meter,
            intervals=loop.Intervals(config.checkpoint.every_steps, config.evaluation.every_steps),
            hooks=loop.Hooks(attempt.record, attempt.evaluate, attempt.save, attempt.stop.asked, attempt.health.vitals),
        )
    finally:
        stream.close()
    done = ledger.step == attempt.last_step
    if done and attempt.evaluated_step != ledger.step:
        attempt.evaluate()
    enter("save", ledger.step)
    attempt.finish_save()
    enter("end")
    if done and attempt.save_failure is None:
        tell_summary(attempt)


def _example_micro_batch(attempt: Attempt) -> Any:
    """A real micro-batch of the largest size: the first of the validation split, repeated where that is too small.

    On a CPU a small one, unless it is compiled for its size: there memory is promised before it is there, and the first
    step, which follows at once, is no later a moment to find that out.
    """
    samples = min(
        attempt.config.batch.micro_samples, -(-attempt.config.batch.global_samples // attempt.world.data_size)
    )
    if attempt.world.device.type == "cpu" and not attempt.config.parallel.compile:
        samples = min(samples, _DRY_SAMPLES_ON_CPU)
    validation = next(iter(attempt.materials.validation.values()))
    batches = evaluation_batches(validation, rank=0, world_size=1, micro_samples=samples, samples=None)
    first = next(iter(batches))
    repeats = -(-samples // first.samples)
    tensors = {
        name: tensor.repeat(repeats, *[1] * (tensor.ndim - 1))[:samples] for name, tensor in first.tensors.items()
    }
    return first._replace(tensors=tensors)


def _make_meter(attempt: Attempt) -> Meter:
    """Says the sizes that a run depends on, and prepares to measure against them."""
    config, world, materials = attempt.config, attempt.world, attempt.materials
    flops_per_item = _flops_per_item(attempt)
    peak = peak_flops(device_name(world.device), _PRECISION_DTYPES[config.parallel.precision])
    batch, largest_part = config.batch, -(-config.batch.global_samples // world.data_size)
    accumulation = -(-largest_part // batch.micro_samples)
    attempt.say(
        f"model {config.model.kind}: {attempt.engine.parameter_count:,} parameters, "
        + (
            "FLOPs unknown"
            if flops_per_item is None
            else f"{flops_per_item / 1e6:,.1f} MFLOP per {materials.item_name}"
        )
    )
    attempt.say(
        f"batch: {batch.global_samples} samples = {world.data_size} ranks x up to {min(batch.micro_samples, largest_part)} "
        f"samples x {accumulation} accumulated"
    )
    attempt.say(f"FLOPs count {FLOP_CONVENTION}")
    if peak is None:
        log.info("MFU is not reported: the peak of %s is unknown", device_name(world.device))
    return Meter(world.device, flops_per_item=flops_per_item, peak_flops=peak, ranks=world.data_size)


def _flops_per_item(attempt: Attempt) -> float | None:
    """None for a user's own model that cannot be counted, which is told: a guess would make MFU a lie."""
    materials = attempt.materials
    try:
        flops = training_flops_per_sample(materials.make_model, materials.task, materials.shape)
    except (NotImplementedError, RuntimeError) as error:
        if ":" not in attempt.config.model.kind:
            raise
        reason = str(error).split("\n")[0]
        attempt.say(f"the FLOPs of {attempt.config.model.kind} are not counted: it fails on the meta device ({reason})")
        return None
    return flops / materials.task.items(materials.task.example(materials.shape, 1))


def _lasting(address: str) -> str:
    """An address that means the same from another working directory."""
    return address if is_remote(address) else str(Path(address).resolve())


def _close(attempt: Attempt | None) -> None:
    if attempt is not None and attempt.progress is not None:
        attempt.progress.close()
    if attempt is not None and attempt.tracking is not None:
        attempt.tracking.close()
        _write_last_line(attempt)


def _write_last_line(attempt: Attempt) -> None:
    """Tells when the attempt ended, and what it did until then."""
    record = {"step": attempt.ledger.step, "attempt": attempt.run.attempt, END_KEY: True}
    try:
        # Opened anew: what made the attempt fail may have torn a line.
        with contextlib.closing(MetricsFile(attempt.run.path)) as file:
            file.append(record | {"clock": attempt.clock.read()})
    except ValueError as error:
        log.info("the account of the run's time ends with the line before: %s", error)
