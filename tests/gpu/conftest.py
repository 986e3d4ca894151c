"""What one GPU can prove. Collected only when it is named: `pytest tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distrib.world import World, leave_world, single_process_world, world_of_group


def pytest_collection_modifyitems() -> None:
    if not torch.cuda.is_available():
        pytest.exit("tests/gpu: NOT RUN: torch sees no GPU", returncode=1)


@pytest.fixture(scope="session")
def gpu() -> World:
    """One process, no process group."""
    return single_process_world("cuda")


@pytest.fixture
def gpu_group() -> Iterator[World]:
    """One process in a group of its own, so that sharding has a mesh."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    world = world_of_group(0, device, timedelta(seconds=60))
    yield world
    leave_world(world)
    dist.destroy_process_group()
