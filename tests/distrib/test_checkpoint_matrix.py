"""Checkpoints pass between all engines, ZeRO stages and world sizes, without conversion and without losing a bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distrib.checkpoint import load_tensors, open_checkpoint, save_checkpoint
from distrib.config import CheckpointConfig
from distrib.engine import Engine
from distrib.world import World, single_process_world
from tests.distrib.lockstep_runs import Curve, Layout, lockstep_engine, take_steps
from tests.distrib.test_lockstep_matrix import LAYOUTS, LOSS_TOLERANCE, NORM_TOLERANCE, PLAIN
from tests.worker_pool import WorkerPool

ALONE = single_process_world("cpu")
TAKEN = 3
EXCHANGED = [
    *(layout for layout in LAYOUTS if layout.world_size in (1, 2, 4)),
    *(Layout("native", stage, 2, replicas=2) for stage in (1, 2, 3)),
]
# What `make test` takes of them: a sharded one of every engine that shards.
SHORT = [layout for layout in EXCHANGED if (layout.zero_stage, layout.world_size, layout.replicas) == (3, 2, 1)]


def save(engine: Engine, root: str) -> None:
    save_checkpoint(
        Path(root),
        engine.canonical_state(),
        step=TAKEN,
        scalars={},
        fields={},
        config=CheckpointConfig(),
        world=engine.world,
    )


def load(engine: Engine, root: str) -> None:
    checkpoint = open_checkpoint(Path(root) / f"step-{TAKEN:08d}", engine.world)
    state = engine.canonical_state()
    load_tensors(checkpoint, state.tensors, engine.world)
    state.scalars = checkpoint.scalars["engine"]
    engine.load_state(state)


def trained(world: World, layout: Layout, kind: str, optimizer: str, root: str) -> Curve:
    """Takes a few steps and saves; returns the twenty that follow."""
    engine = lockstep_engine(world, layout, kind, optimizer)
    take_steps(engine, kind, 2, TAKEN)
    save(engine, root)
    return take_steps(engine, kind, 2)


def loaded_and_saved(world: World, layout: Layout, kind: str, optimizer: str, root: str, again: str) -> Curve:
    """Takes a checkpoint over and saves it again; returns the twenty steps that follow."""
    engine = lockstep_engine(world, layout, kind, optimizer)
    load(engine, root)
    save(engine, again)
    return take_steps(engine, kind, 2)


def tensors_of(kind: str, optimizer: str, root: str) -> dict[str, torch.Tensor]:
    engine = lockstep_engine(ALONE, PLAIN, kind, optimizer)
    load(engine, root)
    return {name: tensor.clone() for name, tensor in engine.canonical_state().tensors.items()}


def assert_agree(found: Curve, expected: Curve) -> None:
    assert found.digest == expected.digest
    assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert found.gradient_norms == pytest.approx(expected.gradient_norms, rel=NORM_TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "kind", "optimizer"),
    [
        *(pytest.param(one, "gpt", "adamw", marks=() if one in SHORT else pytest.mark.long) for one in EXCHANGED),
        *(pytest.param(one, "resnet", "sgd", marks=pytest.mark.long) for one in SHORT),
    ],
    ids=lambda value: f"{value.name}, world {value.world_size}" if isinstance(value, Layout) else value,
)
def test_checkpoints_pass_between_all_engines(
    gloo_pool: WorkerPool, tmp_path: Path, layout: Layout, kind: str, optimizer: str
) -> None:
    reference, again, own = (str(tmp_path / name) for name in ("reference", "again", "own"))
    cell = (layout, kind, optimizer)
    expected = trained(ALONE, PLAIN, kind, optimizer, reference)
    assert_agree(gloo_pool.run(loaded_and_saved, layout.world_size, *cell, reference, again)[0], expected)
    before, after = tensors_of(kind, optimizer, reference), tensors_of(kind, optimizer, again)
    assert before.keys() == after.keys()
    state = {"adamw": "exp_avg_sq", "sgd": "momentum_buffer"}[optimizer]
    assert any(name.startswith(f"optimizer.{state}.") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)

    there = gloo_pool.run(trained, layout.world_size, *cell, own)[0]
    assert_agree(loaded_and_saved(ALONE, PLAIN, kind, optimizer, own, again), there)
