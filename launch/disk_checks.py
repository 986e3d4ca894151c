"""Whether there is room where runs and shards are kept, on every host, and whether it can be written. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data.addresses import is_remote
from data.config import DataConfig
from data.store import open_cache
from launch.checks import Check
from launch.disk import Disk

_LEAST_FREE_BYTES = 1 << 30
_LEAST_FREE_INODES = 1000


def places_in_use(run_directory: Path, data: DataConfig, *, always_cache: bool = False) -> dict[str, Path]:
    """The directories that a run writes to, by their names: the cache only where data is fetched."""
    places = {"run directory": run_directory}
    if always_cache or any(is_remote(stream.directory) for stream in data.by_stream().values()):
        places["cache"] = open_cache(data).directory
    return places


def broken_disks(name: str, by_host: Mapping[str, Disk]) -> list[Check]:
    """The hosts that cannot write there, and why."""
    broken = {host: disk.problem for host, disk in by_host.items() if disk.problem is not None}
    if not broken:
        return []
    title = "disk" if name == "run directory" else f"disk of the {name}"
    figure = ", ".join(f"{reason} (host {host})" for host, reason in broken.items())
    return [Check(title, "broken", figure, f"make room there, or choose another place for the {name}")]


def check_rooms(disks: Mapping[str, Mapping[str, Disk]]) -> list[Check]:
    """disks: by the name of the place and the host. Of each place the host that has the least room."""
    return [_check_room(name, by_host) for name, by_host in disks.items()]


def _check_room(name: str, by_host: Mapping[str, Disk]) -> Check:
    fullest = min(by_host, key=lambda host: _room_left(by_host[host]))
    disk = by_host[fullest]
    inodes = "inodes without a limit" if disk.free_inodes is None else f"{disk.free_inodes:,} inodes free"
    figure = f"{disk.directory}: {disk.free_bytes / 2**30:,.1f} GiB free, {inodes}"
    if len(by_host) > 1:
        figure += f" on host {fullest}, the fullest of {len(by_host)}"
    if _room_left(disk) < 1:
        return Check(name, "broken", figure, "make room, or choose another place for it")
    return Check(name, "ok", figure)


def _room_left(disk: Disk) -> float:
    """How many times what is needed at least is there, of bytes or of inodes."""
    inodes = float("inf") if disk.free_inodes is None else disk.free_inodes / _LEAST_FREE_INODES
    return min(disk.free_bytes / _LEAST_FREE_BYTES, inodes)
