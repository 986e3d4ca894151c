"""A model that starts on the meta device is never whole on any rank, not even while its initial values are drawn."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.live_memory import PeakMemory
from distrib.config import ParallelConfig
from distrib.native import NativeEngine
from tests.distrib.engine_runs import ADAMW_CLIPPED, MODEL, make_engine
from tests.distrib.lockstep_runs import laid_out
from tests.worker_pool import WorkerPool

DEEP = MODEL.model_copy(update={"layers": 8, "width": 128})


def _start(world: Any) -> dict[str, float]:
    """Bytes: the most that weights took while an engine was built, this rank's shard, the largest wrapped unit, all."""
    world = laid_out(world, ParallelConfig(zero_stage=3))
    measured: dict[str, float] = {}

    class Measured(NativeEngine):
        def _make_module(self, setup: Any) -> Any:
            with PeakMemory() as memory:
                module = super()._make_module(setup)
            measured["peak"] = memory.peak_bytes
            return module

    module: Any = make_engine(world, ADAMW_CLIPPED, Measured, DEEP, zero_stage=3).module
    sizes = {id(parameter): 4 * parameter.numel() for parameter in module.parameters()}
    units = [sum(4 * parameter.numel() for parameter in block.parameters()) for block in module.blocks()]
    measured["whole"] = sum(sizes.values())
    measured["unit"] = max(*units, measured["whole"] - sum(units))
    measured["shard"] = sum(4 * parameter.to_local().numel() for parameter in module.parameters())
    return measured


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_start_holds_the_shard_and_at_most_one_unit(gloo_pool: WorkerPool, world_size: int) -> None:
    for measured in gloo_pool.run(_start, world_size):
        assert measured["unit"] < 0.2 * measured["whole"]
        assert measured["shard"] <= measured["peak"] <= measured["shard"] + measured["unit"]
