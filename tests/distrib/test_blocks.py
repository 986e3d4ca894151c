"""Recomputed activations and compiled blocks: the same values, less memory."""

from __future__ import annotations

import pytest
import torch

from distrib.world import World, single_process_world
from tests.distrib.engine_runs import (
    ADAMW_CLIPPED,
    MODEL,
    NativeEngine,
    curve,
    global_batch,
    make_engine,
    reference_curve,
)
from tests.distrib.test_native_engine import assert_same_curve
from tests.distrib.test_sharding import mesh_of
from tests.worker_pool import WorkerPool

ALONE = single_process_world("cpu")
WITH_DROPOUT = MODEL.model_copy(update={"dropout": 0.2})


def _curve(world: World, zero_stage: int, activation_checkpointing: str, precision: str) -> list[tuple[float, float]]:
    return curve(
        mesh_of(world, zero_stage), ADAMW_CLIPPED, 2, NativeEngine, WITH_DROPOUT, precision, zero_stage,
        activation_checkpointing=activation_checkpointing,
    )  # fmt: skip


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.long), "bf16"])
@pytest.mark.parametrize(
    ("world_size", "zero_stage"),
    [(1, 0), (2, 0), (2, 3), *(pytest.param(2, stage, marks=pytest.mark.long) for stage in (1, 2))],
)
def test_recomputing_changes_no_bit(gloo_pool: WorkerPool, world_size: int, zero_stage: int, precision: str) -> None:
    kept, *recomputed = (
        gloo_pool.run(_curve, world_size, zero_stage, how, precision)[0] for how in ("none", "selective", "full")
    )
    assert all(points == kept for points in recomputed)


def _kept_bytes(activation_checkpointing: str) -> int:
    """Bytes that autograd keeps between the forward and the backward pass."""
    engine = make_engine(ALONE, ADAMW_CLIPPED, activation_checkpointing=activation_checkpointing)
    weights = {parameter.untyped_storage().data_ptr() for parameter in engine.module.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        engine.module(global_batch(0)["tokens"][:, :-1]).sum()
    return sum(kept.values())


def test_recomputing_keeps_less() -> None:
    none, full = _kept_bytes("none"), _kept_bytes("full")
    assert full < 0.5 * none


@pytest.mark.long
@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_compiled_blocks_give_the_reference_curve(gloo_pool: WorkerPool, world_size: int, zero_stage: int) -> None:
    points = gloo_pool.run(_compiled_curve, world_size, zero_stage)[0]
    assert_same_curve(points, reference_curve(ADAMW_CLIPPED))


def _compiled_curve(world: World, zero_stage: int) -> list[tuple[float, float]]:
    return curve(mesh_of(world, zero_stage), ADAMW_CLIPPED, 7, NativeEngine, MODEL, "fp32", zero_stage, compile=True)
