"""`lockstep train --debug --fake-world N`: what one rank of N would hold, need and send, from a step that it really takes."""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from data.plan import Plan
from data.stream import GlobalStep
from distrib.blocks import blocks_of
from distrib.engine import Engine, EngineSetup
from distrib.engines import make_engine
from distrib.fake_world import FakeWorld, join_fake_world
from distrib.reduction import report_step
from distrib.sharding import local
from distrib.step_sizes import StepSizes, measure_step
from distrib.world import leave_world
from launch.config import RunConfig
from launch.debug import show_first
from launch.feed import make_feed
from launch.materials import Materials, open_materials
from launch.planning import segment_of
from launch.streams import open_streams
from launch.tables import format_table

# The first lays everything out as it stays: DDP makes its buckets anew after its first backward pass.
_STEPS = 2


def run_in_fake_world(config: RunConfig, *, size: int, rank: int, steps: int | None) -> int:
    """Takes `steps` steps (None: two), of which the last is measured, and prints what it took. Leaves no run behind."""
    materials = open_materials(config, open_streams(config.data))
    world = join_fake_world(config.run.device, config.parallel, size=size, rank=rank)
    try:
        _show(_describe_world(config, world))
        engine = _make_engine(config, materials, world)
        shapes = _watch_shapes(engine.module)
        sizes = _take_steps(config, materials, engine, steps or _STEPS)
        _show(_module_table(engine.module, shapes))
        _show(_memory_table(sizes))
        _show(_collective_table(sizes))
    finally:
        leave_world(world)
    return 0


def _describe_world(config: RunConfig, world: FakeWorld) -> str:
    parallel = config.parallel
    layout = f"{parallel.engine} engine, ZeRO {parallel.zero_stage}, {parallel.precision}"
    if parallel.zero_stage:
        layout += f", {world.size // world.shards} x {world.shards} ranks (copies of the model x shards of each)"
    return (
        f"rank {world.rank} of {world.size}, alone on {world.device}: {layout}\n"
        "nothing is sent: sizes are those of the real run, and losses, gradients and weights mean nothing"
    )


def _make_engine(config: RunConfig, materials: Materials, world: FakeWorld) -> Engine:
    return make_engine(
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


def _take_steps(config: RunConfig, materials: Materials, engine: Engine, steps: int) -> StepSizes:
    """What the last step took. The first batch is shown."""
    feed = make_feed(config, materials, engine.world)
    plan = Plan.of([segment_of(config, materials.sources)])
    stop_position = steps * config.batch.global_samples
    for line in feed.check(plan, 0, stop_position, steps, nodes=1):
        print(line, file=sys.stderr, flush=True)
    stream = feed.open(plan, 0, stop_position)
    try:
        batches = show_first(iter(stream), materials.item_name, _show)
        for number, batch in enumerate(batches, start=1):
            if number == 1:
                engine.dry_run(batch.micro_batches[0])
            if number < steps:
                _take(engine, batch)
            else:
                sizes = measure_step(engine, partial(_take, engine, batch))
        return sizes
    finally:
        stream.close()


def _take(engine: Engine, batch: GlobalStep) -> None:
    """A step as the loop takes it."""
    result = engine.step(batch.micro_batches, batch.items)
    report_step(result, fold=batch.fold, stop_requested=False, data_wait_seconds=0.0, world=engine.world).read()


def _watch_shapes(module: nn.Module) -> dict[nn.Module, str]:
    """What every block, and the whole model, gives out in its first forward pass; filled in as they do."""
    shapes: dict[nn.Module, str] = {}

    def look(part: nn.Module, _: object, output: object) -> None:
        told = [f"{_dtype(tensor)} {tuple(tensor.shape)}" for tensor in tree_leaves(output) if torch.is_tensor(tensor)]
        shapes.setdefault(part, ", ".join(told))

    for part in {*blocks_of(module), module}:
        part.register_forward_hook(look)
    return shapes


def _module_table(module: nn.Module, shapes: dict[nn.Module, str]) -> str:
    names = {part: name for name, part in module.named_modules()}
    rows = [("module", "class", "parameters", "on this rank", "output, first micro-batch")]
    for part in (*(block for block in blocks_of(module) if block is not module), module):
        sharded = [local(parameter.detach()).numel() for parameter in part.parameters()]
        rows.append(
            (
                names[part] or "all",
                _class_name(part),
                f"{sum(parameter.numel() for parameter in part.parameters()):,}",
                f"{sum(sharded):,}",
                shapes.get(part, "not called"),
            )
        )
    return format_table(rows)


def _memory_table(sizes: StepSizes) -> str:
    rows = [("memory of this rank", "bytes", "MiB")]
    for name, size in (
        ("parameters and buffers, between steps", sizes.parameters),
        ("gradients, at the update", sizes.gradients),
        ("optimizer state", sizes.optimizer),
        ("peak of a step, all tensors", sizes.peak),
    ):
        rows.append((name, f"{size:,}", f"{size / 2**20:,.1f}"))
    return format_table(rows)


def _collective_table(sizes: StepSizes) -> str:
    """Bytes are those of the whole tensor that is reduced or gathered, whatever an algorithm sends for it."""
    rows = [("collective", "ranks", "dtype", "calls a step", "bytes a step")]
    by_size = sorted(sizes.collectives.items(), key=lambda item: -item[1][1])
    for kind, (calls, size) in by_size:
        rows.append((kind.operation, str(kind.ranks), kind.dtype, f"{calls:,}", f"{size:,}"))
    return format_table(rows)


def _class_name(part: nn.Module) -> str:
    """As its author named it: sharding makes a class of its own, whose name begins with FSDP."""
    return type(part).__name__.removeprefix("FSDP" if isinstance(part, FSDPModule) else "")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _show(text: str) -> None:
    print(f"{text}\n", flush=True)
