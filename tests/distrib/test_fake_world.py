"""A rank of a fake world holds, needs and sends what the same rank of the real world does, byte for byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from distrib.config import ParallelConfig
from distrib.fake_world import join_fake_world
from distrib.footprint import footprint
from distrib.step_sizes import StepSizes, measure_step
from distrib.world import World
from tests.distrib.engine_runs import ADAMW_CLIPPED, global_batch, make_engine, share_of, take_step
from tests.distrib.lockstep_runs import laid_out
from tests.worker_pool import WorkerPool

SIZE = 4
RANKS = (0, 3)
MICRO_SAMPLES = 1
LAYOUTS = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "ZeRO 1, 2 replicas": {"zero_stage": 1, "replicas": 2},
    "ZeRO 3, 2 replicas": {"zero_stage": 3, "replicas": 2},
    "ZeRO 3 in bf16": {"zero_stage": 3, "precision": "bf16"},
}


def _measured(world: World, options: dict) -> tuple[StepSizes, list[int]]:
    """A rank's third step, of two micro-batches, and the elements of the model's parameters."""
    engine = make_engine(world, ADAMW_CLIPPED, **options)
    engine.dry_run(share_of(global_batch(0), 0, 0, 1, MICRO_SAMPLES)[0])
    for step in (0, 1):
        take_step(engine, step, MICRO_SAMPLES)
    sizes = measure_step(engine, lambda: take_step(engine, 2, MICRO_SAMPLES))
    return sizes, [parameter.numel() for parameter in engine.module.parameters()]


def _really(world: World, options: dict) -> tuple[StepSizes, list[int]]:
    return _measured(laid_out(world, ParallelConfig(**options)), options)


def _alone(_: World, options: dict, rank: int) -> tuple[StepSizes, list[int]]:
    world = join_fake_world("cpu", ParallelConfig(**options), size=SIZE, rank=rank)
    try:
        return _measured(world, options)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process that is always the same rank: torch remembers how a mesh cut a tensor for its rank."""
    pools = {rank: WorkerPool() for rank in RANKS}
    yield lambda function, rank, *arguments: pools[rank].run(function, 1, *arguments, rank)[0]
    for pool in pools.values():
        pool.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_alone_is_as_large_as_among_the_others(
    layout: str, gloo_pool: WorkerPool, alone: Callable[..., Any]
) -> None:
    options = LAYOUTS[layout]
    real = gloo_pool.run(_really, SIZE, options)
    for rank in RANKS:
        sizes, parameter_sizes = alone(_alone, rank, options)
        expected, _ = real[rank]
        assert dataclasses.replace(sizes, peak=0) == dataclasses.replace(expected, peak=0)
        # What is sent for real is held until it has arrived.
        assert 0.85 * expected.peak < sizes.peak <= 1.01 * expected.peak
        assert sizes.peak > sizes.parameters + sizes.gradients + sizes.optimizer
        stated = footprint(
            ParallelConfig(**options), ADAMW_CLIPPED, parameter_sizes=parameter_sizes, world_size=SIZE, micro_batches=2
        )
        sent = {kind: size for kind, (_, size) in sizes.collectives.items() if size > 100}
        for operation, size in stated.traffic.items():
            assert sum(sent[kind] for kind in sent if kind.operation == operation) == pytest.approx(size, rel=0.03)
        assert sizes.gradients == pytest.approx(stated.gradients, rel=0.03)
        assert sizes.optimizer == pytest.approx(stated.optimizer, rel=0.03)


def test_the_groups_of_a_hybrid_layout_are_told_apart(alone: Callable[..., Any]) -> None:
    sizes, _ = alone(_alone, 0, {"zero_stage": 3, "replicas": 2})
    ranks = {kind.operation: kind.ranks for kind, (_, size) in sizes.collectives.items() if size > 100}
    assert ranks == {"allgather": 2, "reduce_scatter": 2, "allreduce": 2}


def test_a_rank_of_a_fake_world_reads_what_it_would_read(alone: Callable[..., Any]) -> None:
    assert [alone(_place, rank) for rank in RANKS] == [(rank, rank, SIZE) for rank in RANKS]


def _place(_: World, rank: int) -> tuple[int, int, int]:
    world = join_fake_world("cpu", ParallelConfig(zero_stage=1, replicas=2), size=SIZE, rank=rank)
    try:
        return world.rank, world.data_rank, world.data_size
    finally:
        dist.destroy_process_group()
