"""The deepspeed engine ends with its world: its process groups, and all that the library would keep."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import pytest
import torch

from distrib.world import World, leave_world
from tests.distrib.engine_runs import take_step
from tests.distrib.test_deepspeed_engine import make
from tests.worker_pool import WorkerPool


def _lone(world: World) -> tuple[bool, bool]:
    """Whether there is a process group while an engine works, and after its world was left."""
    take_step(make(world, 2), 0, 7)
    during = torch.distributed.is_initialized()
    leave_world(world)
    return during, torch.distributed.is_initialized()


def test_a_world_of_one_has_a_group_until_it_is_left(gloo_pool: WorkerPool) -> None:
    assert gloo_pool.run(_lone, 1) == [(True, False)]


def _steps(world: World, zero_stage: int) -> None:
    take_step(make(world, zero_stage), 0, 7)


def _process_groups(world: World) -> int:
    """As many as there are of the threads that gloo has one of for each."""
    gc.collect()
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            names.append((task / "comm").read_text())
    return sum(name.startswith("gloo_tcp_loop") for name in names)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_an_engine_and_its_process_groups_end_with_their_world(gloo_pool: WorkerPool, zero_stage: int) -> None:
    groups = []
    for _ in range(4):
        gloo_pool.run(_steps, 2, zero_stage)
        groups.append(gloo_pool.run(_process_groups, 2)[0])
    assert 0 < groups[3] <= groups[1]
