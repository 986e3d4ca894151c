"""Claims: which files of a shared cache each live process needs, and how soon.

A process holds the lock of `NAME.lock` as long as it lives and rewrites `NAME.json` as it goes on. Claims whose lock
can be taken are a dead process's; whoever finds them removes them.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from data.locks import listing, take_lock


class Claim(NamedTuple):
    """How soon a file is needed, in samples (0: it is in use now), and its size."""

    distance: int
    bytes: int


class Claims:
    """What this process claims of a cache, and what the others do."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # The name decides nothing but itself; a process may have several caches.
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._lock: FileIO | None = None

    def publish(self, claims: Mapping[str, Claim]) -> None:
        """Let the others know which files, by their sha256, are needed how soon. OSError as the file system raises it."""
        path, fresh = (self._directory / f"{self._name}.{kind}" for kind in ("lock", "new"))
        while True:
            if self._lock is None or not path.exists():  # it may have been deleted with the whole cache
                self._lock = take_lock(path, wait=True)
            with contextlib.suppress(FileNotFoundError):  # or be deleted now
                fresh.write_text(json.dumps(dict(claims)))
                fresh.replace(path.with_suffix(".json"))
                return

    def of_others(self) -> dict[str, Claim]:
        """The nearest use of each file that another live process claims."""
        nearest: dict[str, Claim] = {}
        for lock in listing(self._directory):
            if lock.suffix != ".lock" or lock.stem == self._name:
                continue
            dead = take_lock(lock, wait=False)
            if dead is not None:
                for suffix in (".json", ".new", ".lock"):
                    lock.with_suffix(suffix).unlink(missing_ok=True)
                dead.close()
                continue
            for sha256, claim in _read(lock.with_suffix(".json")).items():
                nearest[sha256] = min(claim, nearest.get(sha256, claim))
        return nearest


def _read(path: Path) -> dict[str, Claim]:
    """The claims of a file; none where it is not there yet or is damaged: claims only make evictions wiser."""
    try:
        claims = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(claims, dict):
        return {}
    return {sha256: Claim(*claim) for sha256, claim in claims.items() if _is_claim(claim)}


def _is_claim(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
