"""Ranks for engines that count what each process has built: the same processes together, every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.gloo_pool import GlooPool


class Ranks:
    """A gloo world of one size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = GlooPool(size)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(world, *arguments)` on every rank; the results in rank order."""
        return self._pool.run(function, self.size, *arguments)

    def close(self) -> None:
        self._pool.close()


# DeepSpeed numbers modules through the life of a process and compares the numbers between ranks. Session scope, so that
# the tests of one size run one after another and one world is alive at a time.
@pytest.fixture(scope="session", params=[2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 3, 4))])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    world = Ranks(request.param)
    yield world
    world.close()
