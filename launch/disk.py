"""How fast and how full a directory's file system is, as this host finds it. Imports no torch, and leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

_BLOCK = os.urandom(1 << 20)  # no file system can compress it
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes/s of a file that was written and flushed, and read again, as far as the system forgets it in between."""

    write: float
    read: float


@dataclass(frozen=True)
class Disk:
    """What lies under a directory that is there, or will be made."""

    directory: Path
    place: Path
    """The directory, or the nearest one above it that is there."""
    number: int
    """Which of the host's file systems it is."""
    free_bytes: int
    free_inodes: int | None
    """None where there is no limit."""
    speed: DiskSpeed | None = None
    """None where another directory on the same disk was measured, or it could not be."""
    problem: str | None = None
    """Why it cannot be written."""

    def at_its_best(self, again: Disk) -> Disk:
        """Of two looks at one disk: what else runs can only make it slower."""
        speeds = [disk.speed for disk in (self, again) if disk.speed is not None]
        if not speeds:
            return again
        best = DiskSpeed(max(speed.write for speed in speeds), max(speed.read for speed in speeds))
        return replace(again, speed=best)


def look_at_disks(directories: Mapping[str, Path], seconds: float) -> dict[str, Disk]:
    """Looks at the disk of each directory, and measures it once, for some times `seconds`, however many lie on it."""
    disks: dict[str, Disk] = {}
    for name, directory in directories.items():
        disk = look_at_room(directory)
        if disk.problem is None and disk.number not in (other.number for other in disks.values()):
            try:
                disk = replace(disk, speed=measure_disk(disk.place, seconds))
            except OSError as error:
                disk = replace(disk, problem=f"{error.filename or disk.place}: {error.strerror}")
        disks[name] = disk
    return disks


def look_at_room(directory: Path) -> Disk:
    """All but how fast it is."""
    place = existing_part(directory)
    status = os.statvfs(place)
    return Disk(
        directory,
        place,
        place.stat().st_dev,
        status.f_bavail * status.f_frsize,
        status.f_favail if status.f_files else None,
        problem=None if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written",
    )


def existing_part(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    directory = directory.absolute()
    return next(place for place in (directory, *directory.parents) if place.is_dir())


def measure_disk(directory: Path, seconds: float) -> DiskSpeed:
    """Writes for at most about `seconds`, flushes, and reads that again. OSError where it cannot be done.

    The file has no name, or loses it at once: it is gone however this process ends.
    """
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        begun = time.perf_counter()
        size = 0
        while size < _MOST_BYTES and time.perf_counter() - begun < seconds:
            size += file.write(_BLOCK)
        os.fsync(file.fileno())
        written = time.perf_counter() - begun
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(len(_BLOCK))
        begun = time.perf_counter()
        while file.readinto(buffer):
            pass
        return DiskSpeed(size / written, size / (time.perf_counter() - begun))
