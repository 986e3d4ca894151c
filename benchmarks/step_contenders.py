"""The contenders of the step benchmark: the bare loop that a researcher writes first, and this project's own loop."""

from __future__ import annotations

import dataclasses
import io
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.order import GlobalOrder
from data.plan import Plan
from data.store import LocalStore, read_manifest
from data.stream import Stream
from distrib.engine import Engine, EngineSetup
from distrib.engines import make_engine
from distrib.initialisation import make_initialised_model
from distrib.launchers import Launch
from distrib.phases import Moment, observe
from distrib.world import World, join_world, leave_world
from launch.attempt import Attempt
from launch.clock import Clock
from launch.config import RunConfig
from launch.console import Progress
from launch.feed import make_feed
from launch.heartbeats import Heartbeat
from launch.ledger import Ledger
from launch.loop import Hooks, Intervals, train
from launch.materials import Materials, open_materials
from launch.meter import Meter
from launch.planning import segment_of
from launch.recipe import parse_recipe
from launch.run_directory import RunDirectory
from launch.stopping import StopRequest
from launch.tracking.tracking import Tracking
from launch.worker_log import start_logging

BARE, PLAIN, UNWATCHED, FULL, SUPERVISED = "bare", "plain", "unwatched", "full", "supervised"
MEANING = {
    BARE: "a bare PyTorch loop: fused AdamW, batches from a memory map, DDP with its defaults on two processes",
    PLAIN: "this loop and its stream, without clipping and tracking (digest and gradient norm are always computed)",
    UNWATCHED: "this loop and its stream with clipping, digest, progress and `metrics.jsonl`",
    FULL: "the same, with what the recipe's section `health` watches by default",
    SUPERVISED: "the same with heartbeats, which another process looks at as `lockstep train` does",
}
SPARE_STEPS = 256  # the stream never ends within a measurement, so that its thread always has work
PROBE_SAMPLES = 8
UNWATCHED_HEALTH = {"loss_spike": "ignore", "compare_paces_every_steps": None, "compare_replicas_every_steps": None}
# High enough never to scale a gradient, so that the probe loss stays comparable; clipping costs the same.
CLIP_NORM = 1e6


@dataclass(frozen=True)
class Table:
    """One comparison: a model, a number of processes, and how much is measured."""

    size: str
    processes: int
    threads: int
    model: dict[str, Any]
    sequence_tokens: int
    micro_samples: int
    contenders: tuple[str, ...]
    starts: int
    rounds: int
    block_steps: int
    warmup_steps: int
    most_over_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    """Milliseconds a step above the bare loop that a contender may cost."""
    most_ratio: dict[str, float] = dataclasses.field(default_factory=dict)
    """Step time over the bare loop's that a contender may need."""
    against: str = BARE
    """The contender that the others are compared with."""

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.rounds * self.block_steps

    @property
    def global_samples(self) -> int:
        return self.micro_samples * self.processes

    @property
    def title(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes, gloo,"
        supervision = ", supervision, by seconds of work" if self.switched else ""
        return f"{processes} x {self.threads} thread(s), {self.size} model{supervision}"

    @property
    def switched(self) -> bool:
        """Whether its contenders are the same processes, with and without heartbeats."""
        return SUPERVISED in self.contenders


@dataclass(frozen=True)
class Job:
    """What one process of a contender is told."""

    table: Table
    contender: str
    rank: int
    port: int
    listening: socket.socket | None
    """For rank 0: what listens at `port`."""
    dataset: Path
    directory: Path
    board: int | None
    """The file descriptor, in the process that started this one, of the memory for heartbeats."""


def run_contender(connection: Connection, job: Job) -> None:
    """The life of one process of a contender: set up, run blocks when the gate opens, tell the probe loss."""
    if job.board is not None:
        _switch.heartbeat = Heartbeat(os.open(f"/proc/{os.getppid()}/fd/{job.board}", os.O_RDWR), job.rank)
        _switch.clock = time.process_time
        observe(_switch)
    torch.set_num_threads(job.table.threads)
    config = _config(job)
    materials = open_materials(config, {"": LocalStore(job.dataset)})
    listening = None if job.listening is None else job.listening.detach()
    launch = Launch("benchmark", job.rank, job.table.processes, job.rank, "127.0.0.1", job.port, listening)
    world = join_world(launch, "cpu")
    run = _run_bare if job.contender == BARE else _run_lockstep
    module, watching_ms = run(job, config, materials, world, connection)
    probe_loss = _probe_loss(module, job)
    connection.send((probe_loss, watching_ms, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    leave_world(world)


class _Switch:
    """Heartbeats that are on or off from block to block."""

    def __init__(self) -> None:
        self.heartbeat: Heartbeat | None = None
        self.on = False
        self.clock = time.perf_counter

    def __call__(self, moment: Moment) -> None:
        if self.on and self.heartbeat is not None:
            self.heartbeat(moment)


_switch = _Switch()


def _gated(connection: Connection, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches, in blocks of as many as the gate says, with or without heartbeats, until it says 0.

    A block's time runs from its first fetch until the loop asks for the batch after its last, so nothing of the loop is
    left out and waiting at the gate is not counted.
    """
    connection.send("ready")
    while steps := connection.recv():
        _switch.on = connection.recv()
        begun = _switch.clock()
        yield from islice(batches, steps)
        connection.send(_switch.clock() - begun)


def _config(job: Job) -> RunConfig:
    table = job.table
    recipe = {
        "run": {"name": "benchmark", "steps": table.total_steps + SPARE_STEPS, "directory": str(job.directory)},
        "model": table.model,
        "task": {"kind": "language_modelling"},
        "data": data_section(job.dataset) | {"sequence_tokens": table.sequence_tokens},
        "batch": {"global_samples": table.global_samples, "micro_samples": table.micro_samples},
        "optimizer": {
            "lr": 1e-3,
            "weight_decay": 0.0,  # which parameters are decayed is a matter of taste, not of speed
            "clip_norm": None if job.contender == PLAIN else CLIP_NORM,
        },
        "schedule": {"kind": "constant"},
        "checkpoint": {"every_steps": None},
        "tracking": {"wandb": "off", "tensorboard": False, "progress": "lines"},
        "health": {} if job.contender in (FULL, SUPERVISED) else UNWATCHED_HEALTH,
    }
    return parse_recipe(recipe, "benchmark")


def data_section(dataset: Path) -> dict[str, Any]:
    # One shard, which the bare loop can map as it is.
    return {"source": "stdlib", "tokenizer": "bytes", "directory": str(dataset), "shard_bytes": 2**30}


def _rows(job: Job) -> npt.NDArray[np.uint16]:
    """The training samples (n, T + 1) as views into the memory map, each row's last token the next one's first."""
    (shard,) = read_manifest(LocalStore(job.dataset)).splits["train"].shards
    tokens = np.memmap(job.dataset / shard.data.name, dtype="<u2", mode="r")
    sequence_tokens = job.table.sequence_tokens
    return np.lib.stride_tricks.sliding_window_view(tokens, sequence_tokens + 1)[::sequence_tokens]


Ran = tuple[nn.Module, float]
"""The model, and milliseconds of this process's own time that watching its health took of a step."""


def _run_bare(job: Job, config: RunConfig, materials: Materials, world: World, connection: Connection) -> Ran:
    """The loop that a researcher writes first."""
    table, rows = job.table, _rows(job)
    positions = np.arange((table.total_steps + SPARE_STEPS) * table.global_samples)
    order = GlobalOrder(len(rows), config.run.seed).sample_ids(positions)[1]
    index = order.reshape(-1, world.size, table.micro_samples)[:, world.rank]  # (steps, micro_samples)
    batches = (torch.from_numpy(rows[ids].astype(np.int64)) for ids in index)

    module = make_initialised_model(materials.make_model, config.run.seed, world.device)
    model = module if world.size == 1 else DistributedDataParallel(module)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, settings.betas, settings.epsilon, settings.weight_decay, fused=True
    )
    for tokens in _gated(connection, batches):
        logits = model(tokens[:, :-1])  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, 0.0


def _run_lockstep(job: Job, config: RunConfig, materials: Materials, world: World, connection: Connection) -> Ran:
    """The real loop over the real engine and stream; PLAIN without, the others with what a run writes and shows."""
    plan = Plan.of([segment_of(config, materials.training)])
    engine = make_engine(
        EngineSetup(
            materials.make_model,
            materials.task.loss,
            world,
            optimizer=config.optimizer,
            schedule=config.schedule,
            parallel=config.parallel,
            steps=config.run.steps,
            seed=config.run.seed,
        )
    )
    stream = Stream(
        materials.training,
        plan,
        rank=world.data_rank,
        world_size=world.data_size,
        micro_samples=config.batch.micro_samples,
        position=0,
        stop_position=config.run.steps * config.batch.global_samples,
        count_items=materials.task.items,
        reduce_items=world.sum_in_prefetch_thread if world.size > 1 else None,
        prefetch_steps=config.data.prefetch_steps,
    )
    attempt = _attempt(job, config, materials, world, engine, plan)
    record: Callable[[dict[str, Any]], None] = _ignore if job.contender == PLAIN else attempt.record
    attempt.health.watch_data(stream.making_time)
    watching = _OwnTime()
    for name in ("vitals", "judge"):
        setattr(attempt.health, name, watching.of(getattr(attempt.health, name)))
    try:
        train(
            engine,
            _gated(connection, iter(stream)),
            attempt.ledger,
            world=world,
            meter=Meter(world.device, flops_per_item=None, peak_flops=None, ranks=world.data_size),
            intervals=Intervals(save_every_steps=None, evaluate_every_steps=None),
            hooks=Hooks(record, lambda: None, lambda: None, attempt.stop.asked, attempt.health.vitals),
        )
    finally:
        stream.close()
        if attempt.tracking is not None:
            attempt.tracking.close()
    return engine.module, 1e3 * watching.seconds / engine.steps_done


class _OwnTime:
    """Time that a thread itself computes within some functions: foreign load does not enter."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            begun = time.thread_time()
            result = function(*given)
            self.seconds += time.thread_time() - begun
            return result

        return timed


def _attempt(job: Job, config: RunConfig, materials: Materials, world: World, engine: Engine, plan: Plan) -> Attempt:
    run = RunDirectory(job.directory, {"name": "benchmark", "attempts": [{}], "wandb_run_id": "none"})
    (run.path / "logs").mkdir(parents=True, exist_ok=True)
    start_logging(run.path, world.rank)
    clock = Clock(sees_waiting=world.size > 1)
    attempt = Attempt(
        config, world, run, materials, engine, plan, Ledger(), StopRequest(), make_feed(config, materials, world), clock
    )
    if job.contender != PLAIN and world.rank == 0:
        observe(clock.hear)
        attempt.stop.watch(run.stop_file)
        attempt.progress = Progress("lines", config.run.steps, 1, materials.item_name, stream=io.StringIO())
        attempt.tracking = Tracking(
            config.tracking, run.path, run_name="benchmark", wandb_run_id="none", recipe=config.model_dump(mode="json")
        )
    return attempt


def _ignore(record: dict[str, Any]) -> None:
    """What tracking that is off does with a step."""


@torch.no_grad()
def _probe_loss(module: nn.Module, job: Job) -> float:
    tokens = torch.from_numpy(_rows(job)[:PROBE_SAMPLES].astype(np.int64))
    logits = module.eval()(tokens[:, :-1])
    return float(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
