"""One rank of a world that is not there: its shapes, memory and collectives, without the other ranks' machines.

Collectives go to torch's fake process group, which sends nothing: a rank gets back what it gave. Sizes are those of the
real run; losses, gradients and weights are not.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from distrib.capabilities import count_shards
from distrib.config import ParallelConfig
from distrib.world import World, single_process_world

_BACKEND = "fake"


@dataclass(frozen=True)
class FakeWorld(World):
    """A world whose other ranks would all say what this one says."""

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.size

    def sum_in_prefetch_thread(self, values: list[int]) -> list[int]:
        # The others may have items where this rank has none, and a loss is divided by their number.
        return [max(1, value) * self.size for value in values]


def join_fake_world(device_kind: str, parallel: ParallelConfig, *, size: int, rank: int) -> FakeWorld:
    """This process as one rank of `size`, all of them on other machines. `leave_world` ends it.

    Raises ValueError for a device that is not there, and for replicas that do not divide the ranks.
    """
    assert parallel.engine == "native", "other engines' libraries talk to the other ranks themselves"
    shards = count_shards(parallel, size)
    device = single_process_world(device_kind).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Importing it is what makes the backend known.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(_BACKEND, store=FakeStore(), rank=rank, world_size=size)
    mesh = init_device_mesh(device.type, (size // shards, shards), mesh_dim_names=("replicate", "shard"))
    return FakeWorld(rank, size, 0, device, mesh, host_group=None, prefetch_group=None, save_group=None)


def is_fake(group: Any) -> bool:
    """Whether a process group sends nothing."""
    return dist.get_backend(group) == _BACKEND


def let_replicas_be_fake(replicated: DistributedDataParallel) -> None:
    """DDP asks the process group for the reduced gradient, and the fake one has none to give: it gets its own back."""
    replicated.register_comm_hook(None, _reduce_alone)


# DDP reads this one's annotations: with `from __future__ import annotations` they would be text.
def _reduce_alone(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
