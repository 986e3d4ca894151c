"""A model that starts on the meta device is never whole on any rank, not even while its engine is built."""

from __future__ import annotations

import pytest
from torch.distributed.fsdp import FSDPModule

from distrib.config import OptimizerConfig, ParallelConfig
from distrib.tensor_memory import PeakMemory
from distrib.world import World
from tests.distrib.engine_runs import ADAMW_CLIPPED, MODEL, make_engine
from tests.distrib.lockstep_runs import laid_out
from tests.worker_pool import WorkerPool

DEEP = MODEL.model_copy(update={"layers": 8, "width": 128})
STATELESS = OptimizerConfig(kind="sgd", momentum=0.0)
# Rates, norms, counts.
SCALARS_BYTES = 10_000


def _start(world: World, engine_name: str, optimizer: OptimizerConfig) -> dict[str, float]:
    """Bytes: the most that tensors took while an engine was built, a rank's share of the weights, the largest unit that is
    gathered at once, all weights."""
    world = laid_out(world, ParallelConfig(zero_stage=3))
    with PeakMemory() as memory:
        engine = make_engine(world, optimizer, model=DEEP, zero_stage=3, engine=engine_name)
    whole = 4 * engine.parameter_count
    units = [
        sum(4 * weight._orig_size.numel() for weight in module._get_fsdp_state()._fsdp_param_group.fsdp_params)
        for module in engine.module.modules()
        if isinstance(module, FSDPModule)
    ]
    return {"peak": memory.peak_bytes, "shard": whole / world.size, "unit": max(units, default=whole), "whole": whole}


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_start_holds_the_shard_and_at_most_one_unit(gloo_pool: WorkerPool, world_size: int) -> None:
    for measured in gloo_pool.run(_start, world_size, "native", STATELESS):
        assert measured["unit"] < 0.2 * measured["whole"]
        assert measured["shard"] <= measured["peak"] <= measured["shard"] + measured["unit"]
        assert measured["peak"] < 0.7 * measured["whole"]
    for measured in gloo_pool.run(_start, world_size, "native", ADAMW_CLIPPED):
        assert measured["peak"] <= 3 * measured["shard"] + SCALARS_BYTES


@pytest.mark.long
@pytest.mark.parametrize("world_size", [2, 4])
def test_deepspeed_starts_with_its_copies_and_a_bucket_of_the_model_s_size(
    gloo_pool: WorkerPool, world_size: int
) -> None:
    """Weights and the copy that is updated, a gradient, two moments; see `distrib.footprint`."""
    for measured in gloo_pool.run(_start, world_size, "deepspeed", ADAMW_CLIPPED):
        assert measured["peak"] <= 5 * measured["shard"] + measured["whole"] + SCALARS_BYTES
