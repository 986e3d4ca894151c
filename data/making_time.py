"""How long a rank takes to make its part of the steps by itself: without what it waits for the other ranks meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Made(NamedTuple):
    """What a rank has made itself: per step, the seconds that took it and its samples."""

    seconds: float
    samples: float


class MakingTime:
    """Adds up what the thread that makes steps took for them; the thread that trains takes the means."""

    def __init__(self) -> None:
        self._made = (0.0, 0, 0)  # seconds, steps, samples: always replaced together, because another thread reads them
        self._taken = self._made
        self._waited = 0.0

    @contextlib.contextmanager
    def of(self, steps: int, samples: int) -> Iterator[None]:
        """Around the making of so many steps, in which this rank reads so many samples."""
        begun, self._waited = time.perf_counter(), 0.0
        yield
        seconds, all_steps, all_samples = self._made
        own = time.perf_counter() - begun - self._waited
        self._made = (seconds + own, all_steps + steps, all_samples + samples)

    def waiting(self, exchange: Callable[[list[int]], list[int]], values: list[int]) -> list[int]:
        """What the ranks exchange meanwhile, each waiting for the slowest of them."""
        begun = time.perf_counter()
        exchanged = exchange(values)
        self._waited += time.perf_counter() - begun
        return exchanged

    def take(self) -> Made | None:
        """The means over what was made since the last call; None where nothing was."""
        made = self._made
        seconds, steps, samples = (now - before for now, before in zip(made, self._taken, strict=True))
        self._taken = made
        return Made(seconds / steps, samples / steps) if steps else None
