"""How fast and how full a directory's file system is. Imports no torch, and leaves nothing behind."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

_BLOCK = os.urandom(1 << 20)  # no file system can compress it
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes/s of a file that was written and flushed, and read again, as far as the system forgets it in between."""

    write: float
    read: float


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
