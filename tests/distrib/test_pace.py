"""A rank's own pace: how long it works on a micro-batch, without what it waits for others."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import nn

from distrib.pace import Pace
from distrib.world import World
from tests.distrib.engine_runs import ADAMW_CLIPPED, global_batch, make_engine, share_of, take_step
from tests.distrib.test_sharding import mesh_of
from tests.worker_pool import WorkerPool


def test_only_what_was_asked_for_is_timed() -> None:
    pace = Pace(torch.device("cpu"))
    with pace.of_forward(4):
        pass
    seconds, rows = pace.take()
    assert math.isnan(seconds)
    assert rows == 0
    for _ in range(3):
        pace.ask()
        with pace.of_forward(4):
            pass
        with pace.of_forward(4):  # a later micro-batch
            pass
    assert len(pace._passes) == 3
    seconds, rows = pace.take()
    assert 0 < seconds < 60
    assert rows == 4
    assert math.isnan(pace.take()[0])


def test_a_backward_pass_is_counted_with_the_forward_pass_that_was_timed() -> None:
    pace = Pace(torch.device("cpu"))
    pace.ask()
    with pace.of_forward(4):
        pass
    with pace.of_backward():
        time.sleep(0.02)
    with pace.of_forward(4):  # a later micro-batch
        pass
    with pace.of_backward():
        pass
    assert len(pace._passes) == 1
    assert len(pace._passes[0][1]) == 2
    assert pace.take()[0] >= 0.02


def test_inside_blocks_nothing_around_them_counts() -> None:
    pace, block = Pace(torch.device("cpu")), nn.Linear(2, 2)
    pace.only_inside([block])
    pace.ask()
    with pace.of_forward(1):
        block(torch.zeros(1, 2))
        time.sleep(0.05)
        block(torch.zeros(1, 2))
    block(torch.zeros(1, 2))  # a backward pass computes it again
    ((_, spans),) = pace._passes
    (_, left), (entered, _) = spans
    assert entered - left >= 0.05
    assert pace.take()[0] == sum(end - begin for begin, end in spans)


def test_an_engine_that_cannot_tell_times_nothing() -> None:
    pace = Pace(torch.device("cpu"))
    pace.unknown_because = "of a reason"
    pace.ask()
    with pace.of_forward(1):
        pass
    assert math.isnan(pace.take()[0])


def _paces(world: World, zero_stage: int, checkpointing: str) -> list[float]:
    """Every rank's pace where the blocks of rank 1 take a fifth of a second more: far more than rank 0 could lose to what else
    runs here, in most of its passes."""
    engine: Any = make_engine(
        mesh_of(world, zero_stage), ADAMW_CLIPPED, zero_stage=zero_stage, activation_checkpointing=checkpointing
    )
    engine.dry_run(share_of(global_batch(0), 0, 0, 1, 2)[0])
    if world.rank == 1:
        for block in engine.module.blocks():
            block.register_forward_pre_hook(lambda *_: None)
        slow = engine.module.blocks()[0]
        inner = next(module for module in slow.modules() if not list(module.children()))
        inner.register_forward_hook(lambda *_: time.sleep(0.2))
    for step in range(5):
        engine.pace.ask()
        take_step(engine, step, micro_samples=2)
    return world.gather_objects(engine.pace.take()[0])


@pytest.mark.parametrize(
    ("zero_stage", "checkpointing"), [(0, "none"), (3, "none"), pytest.param(2, "full", marks=pytest.mark.long)]
)
def test_a_slow_rank_is_slow_and_the_one_that_waits_for_it_is_not(
    gloo_pool: WorkerPool, zero_stage: int, checkpointing: str
) -> None:
    paces = gloo_pool.run(_paces, 2, zero_stage, checkpointing)[0]
    assert paces[1] >= 0.2
    assert paces[0] < paces[1]
