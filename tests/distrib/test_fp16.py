"""fp16: losses are scaled, overflow lowers the scale on every rank alike, and the scale is checkpointed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distrib.loss_scaling import LossScaler
from distrib.native import NativeEngine
from distrib.sharding import local
from distrib.world import World, single_process_world
from tests.distrib.engine_runs import ADAMW_CLIPPED, SGD_UNCLIPPED, curve, make_engine, reference_curve, take_step
from tests.distrib.test_sharding import load_step, mesh_of, save_step
from tests.worker_pool import WorkerPool

ALONE = single_process_world("cpu")


def test_the_scale_halves_on_overflow_and_doubles_after_two_thousand_good_steps() -> None:
    scaler = LossScaler(torch.device("cpu"))
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    for _ in range(1999):
        scaler.update(good)
    assert scaler.as_scalars() == {"scale": 65536.0, "good_steps": 1999}
    scaler.update(good)
    assert scaler.as_scalars() == {"scale": 131072.0, "good_steps": 0}
    scaler.update(good)
    scaler.update(bad)
    assert scaler.as_scalars() == {"scale": 65536.0, "good_steps": 0}


def _curve(world: World, zero_stage: int, precision: str) -> list[tuple[float, float]]:
    return curve(mesh_of(world, zero_stage), SGD_UNCLIPPED, 2, NativeEngine, precision=precision, zero_stage=zero_stage)


@pytest.mark.parametrize(
    ("world_size", "zero_stage"), [(1, 0), (2, 0), (2, 1), (2, 3), pytest.param(2, 2, marks=pytest.mark.long)]
)
def test_the_loss_scale_does_not_reach_the_gradient_norm(
    gloo_pool: WorkerPool, world_size: int, zero_stage: int
) -> None:
    reference = reference_curve(SGD_UNCLIPPED)
    points = gloo_pool.run(_curve, world_size, zero_stage, "fp16")[0]
    # fp16 rounds to 2**-11: a step's loss and norm average many such roundings.
    assert [loss for loss, _ in points] == pytest.approx([loss for loss, _ in reference], rel=2**-11)
    assert [norm for _, norm in points] == pytest.approx([norm for _, norm in reference], rel=2**-8)


def _overflowing(world: World, zero_stage: int) -> tuple[list[bool], list[bool], float]:
    """Steps that start from a scale under which half precision overflows: skipped ones, changed weights, the last scale."""
    engine = make_engine(mesh_of(world, zero_stage), ADAMW_CLIPPED, precision="fp16", zero_stage=zero_stage)
    assert engine._scaler is not None
    engine._scaler.scale.fill_(2.0**24)
    skipped, changed = [], []
    for step in range(12):
        before = [local(tensor).clone() for tensor in engine.canonical_state().tensors.values()]
        norm = take_step(engine, step, 7)[1]
        after = [local(tensor) for tensor in engine.canonical_state().tensors.values()]
        skipped.append(not torch.isfinite(torch.tensor(norm)).item())
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return skipped, changed, engine._scaler.scale.item()


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_overflow_skips_steps_until_the_scale_fits(gloo_pool: WorkerPool, zero_stage: int) -> None:
    answers = gloo_pool.run(_overflowing, 2, zero_stage)
    skipped, changed, scale = answers[0]
    assert answers[1] == answers[0]
    assert skipped[0]
    assert not skipped[-1]
    assert changed == [not bad for bad in skipped]
    assert scale == 2.0 ** (24 - sum(skipped))


def test_the_scale_is_checkpointed(tmp_path: Path) -> None:
    engine = make_engine(ALONE, ADAMW_CLIPPED, precision="fp16")
    assert engine._scaler is not None
    engine._scaler.scale.fill_(1024.0)
    take_step(engine, 0, 7)
    save_step(engine, str(tmp_path), 1)

    resumed = make_engine(ALONE, ADAMW_CLIPPED, precision="fp16")
    assert resumed._scaler is not None
    load_step(resumed, str(tmp_path), 1)
    assert resumed._scaler.as_scalars() == {"scale": 1024.0, "good_steps": 1}
    assert take_step(resumed, 1, 7) == take_step(engine, 1, 7)
