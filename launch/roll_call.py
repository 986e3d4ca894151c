"""Who takes part: a table of ranks, hosts, devices and launchers, printed once when all workers have met."""

from __future__ import annotations

import itertools
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from distrib.launchers import Launch
from distrib.world import World
from launch.exit_codes import USAGE, RunEnded
from launch.tables import format_table

# Up to so many hosts have a line each; above, neighbours of one kind share one.
_LINES = 16


@dataclass(frozen=True)
class Present:
    """A worker, as it tells the others."""

    host: str
    device: str
    """As torch names it: cpu, cuda:3."""
    model: str
    """What the device is, for a GPU."""
    launcher: str
    gpu: str | None = None
    """What no other GPU of this host has; a task may see its own alone, and call it cuda:0 as its neighbours do theirs."""


@dataclass(frozen=True)
class _Line:
    ranks: range
    hosts: tuple[str, ...]
    workers: tuple[Present, ...]
    """Of each of the hosts, as they are on the first."""

    @property
    def kind(self) -> tuple[tuple[str, str, str], ...]:
        return tuple((worker.device, worker.model, worker.launcher) for worker in self.workers)


def call_roll(world: World, launch: Launch) -> None:
    """Every rank tells where it is; rank 0 prints the table. Raises RunEnded on all ranks where two share a GPU."""
    everyone = world.gather_objects(_describe(world, launch))
    refuse_shared_gpus(everyone)
    if world.rank == 0:
        print(roll(everyone, launch.meeting_point if world.size > 1 else None), file=sys.stderr, flush=True)


def refuse_shared_gpus(everyone: Sequence[Present]) -> None:
    """Two workers on one GPU are two launchers, or one that started too many."""
    seen: dict[tuple[str, str], int] = {}
    for rank, worker in enumerate(everyone):
        if worker.gpu is None:
            continue
        first = seen.setdefault((worker.host, worker.gpu), rank)
        if first != rank:
            raise RunEnded(
                f"ranks {first} and {rank} share {worker.device} of {worker.host}: were two launchers started there, or more "
                "workers than it has GPUs?",
                USAGE,
                told_by_all=True,
            )


def roll(everyone: Sequence[Present], meeting_point: str | None) -> str:
    """The table. A host's ranks share a line, and in a large run so do neighbouring hosts that are alike: what is left alone is
    what differs."""
    lines = [_line(ranks, everyone) for ranks in _neighbours(everyone)]
    if len(lines) > _LINES:
        lines = list(_merged(lines))
    rows = [("rank", "host", "device", "launcher")]
    for line in lines:
        ranks = f"{line.ranks[0]}-{line.ranks[-1]}" if len(line.ranks) > 1 else str(line.ranks[0])
        hosts = (
            line.hosts[0] if len(line.hosts) == 1 else f"{line.hosts[0]} to {line.hosts[-1]} ({len(line.hosts)} hosts)"
        )
        rows.append((ranks, hosts, _devices(line.workers), ", ".join(dict.fromkeys(w.launcher for w in line.workers))))
    met = f"met at {meeting_point}\n" if meeting_point is not None else ""
    return met + format_table(rows)


def _describe(world: World, launch: Launch) -> Present:
    host, device = platform.node(), str(world.device)
    if world.device.type != "cuda":
        return Present(host, device, "", launch.launcher)
    properties = torch.cuda.get_device_properties(world.device)
    return Present(host, device, properties.name, launch.launcher, gpu=str(properties.uuid))


def _neighbours(everyone: Sequence[Present]) -> Iterable[range]:
    """Ranks that follow each other on one host."""
    for _, group in itertools.groupby(range(len(everyone)), key=lambda rank: everyone[rank].host):
        ranks = list(group)
        yield range(ranks[0], ranks[-1] + 1)


def _line(ranks: range, everyone: Sequence[Present]) -> _Line:
    return _Line(ranks, (everyone[ranks[0]].host,), tuple(everyone[rank] for rank in ranks))


def _merged(lines: Iterable[_Line]) -> Iterable[_Line]:
    for _, group in itertools.groupby(lines, key=lambda line: line.kind):
        alike = list(group)
        hosts = tuple(line.hosts[0] for line in alike)
        yield _Line(range(alike[0].ranks[0], alike[-1].ranks[-1] + 1), hosts, alike[0].workers)


def _devices(workers: Sequence[Present]) -> str:
    """`8 x NVIDIA H200 (cuda:0 to cuda:7)`, `2 x cpu`."""
    told = []
    for model, group in itertools.groupby(workers, key=lambda worker: worker.model):
        devices = [worker.device for worker in group]
        names = devices[0] if len(set(devices)) == 1 else f"{devices[0]} to {devices[-1]}"
        count = f"{len(devices)} x " if len(devices) > 1 else ""
        told.append(f"{count}{model} ({names})" if model else f"{count}{names}")
    return ", ".join(told)
