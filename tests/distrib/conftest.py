"""The world sizes that the tests of an engine go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.worker_pool import WorkerPool


class Ranks(NamedTuple):
    """A gloo world of one size."""

    pool: WorkerPool
    size: int

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(world, *arguments)` on every rank; the results in rank order."""
        return self.pool.run(function, self.size, *arguments)


@pytest.fixture(params=[2, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 3, 4))])
def ranks(request: pytest.FixtureRequest, gloo_pool: WorkerPool) -> Ranks:
    return Ranks(gloo_pool, request.param)
