"""Who takes part in a run: ranks, devices and process groups, as the launcher set them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distrib.capabilities import count_shards
from distrib.config import ParallelConfig
from distrib.launchers import ALONE, Launch, choose_gpu
from distrib.meeting import explain, meet

_to_let_go: list[Callable[[], None]] = []


@dataclass(frozen=True)
class World:
    """This process's place in the run. At size 1 there is no process group, unless an engine cannot do without."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh | None
    """Axes (replicate, shard); None at size 1."""
    host_group: Any | None
    """A gloo group for host-side exchanges of the main thread (checkpoints, agreement)."""
    prefetch_group: Any | None
    """A gloo group of the prefetch thread's own: two threads must never share a group."""
    save_group: Any | None
    """A gloo group of the saving thread's own."""

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank reads: its place on the mesh's data axes, which are both of them."""
        if self.mesh is None:
            return 0
        return self.mesh.get_local_rank("replicate") * self.shards + self.mesh.get_local_rank("shard")

    @property
    def data_size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def data_group(self) -> Any | None:
        return None if self.mesh is None else dist.group.WORLD

    @property
    def shards(self) -> int:
        """Over how many ranks a copy of the model is spread."""
        return 1 if self.mesh is None else self.mesh.size(1)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def in_save_thread(self) -> World:
        """This world for the thread that saves beside training: its host-side exchanges go over that thread's own group."""
        return replace(self, host_group=self.save_group)

    def sum_in_prefetch_thread(self, values: list[int]) -> list[int]:
        """Element-wise sum over the data ranks; for the prefetch thread only."""
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.prefetch_group)
        return [int(value) for value in total.tolist()]


def join_world(launch: Launch, device_kind: str = "auto", parallel: ParallelConfig | None = None) -> World:
    """Joins the run that `launch` describes. `device_kind`: auto, cpu or cuda.

    Raises ValueError for a device that is not there, ConnectionError where the others cannot be reached within the
    timeout.
    """
    parallel = parallel or ParallelConfig()
    shards = count_shards(parallel, launch.size)
    device = _choose_device(device_kind, launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.size == 1:
        return _world_alone(device)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    store = meet(launch, timeout)
    try:
        dist.init_process_group(
            _backend(device), store=store, rank=launch.rank, world_size=launch.size, timeout=timeout
        )
        return world_of_group(launch.local_rank, device, timeout, shards)
    except dist.DistError as error:
        raise ConnectionError(explain(launch, error)) from None


def world_of_group(local_rank: int, device: torch.device, timeout: timedelta, shards: int = 1) -> World:
    """The world of the default process group, which must exist: its mesh and the groups that threads need for themselves."""
    size = dist.get_world_size()
    mesh = init_device_mesh(device.type, (size // shards, shards), mesh_dim_names=("replicate", "shard"))
    host_group, prefetch_group, save_group = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(3))
    return World(dist.get_rank(), size, local_rank, device, mesh, host_group, prefetch_group, save_group)


def single_process_world(device_kind: str = "auto") -> World:
    """This process alone, whatever a launcher set."""
    return _world_alone(_choose_device(device_kind, Launch(ALONE)))


def _world_alone(device: torch.device) -> World:
    return World(0, 1, 0, device, mesh=None, host_group=None, prefetch_group=None, save_group=None)


def found_group_of_one(world: World) -> None:
    """Makes the default process group of a world of size 1, for libraries that need one; `leave_world` ends it."""
    if world.size == 1 and not dist.is_initialized():
        dist.init_process_group(_backend(world.device), store=dist.HashStore(), rank=0, world_size=1)


def before_leaving(let_go: Callable[[], None]) -> None:
    """Calls `let_go` when this process leaves its world: for libraries that would keep its process groups alive."""
    _to_let_go.append(let_go)


def leave_world(world: World) -> None:
    """Leaves in step with the others: without the barrier gloo aborts at teardown about half the time."""
    if world.size > 1:
        dist.barrier(group=world.host_group)
    while _to_let_go:
        _to_let_go.pop()()
    if dist.is_initialized():
        dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _choose_device(kind: str, launch: Launch) -> torch.device:
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch sees no GPU; use run.device=cpu or auto")
    return torch.device("cuda", choose_gpu(launch, torch.cuda.device_count()))
