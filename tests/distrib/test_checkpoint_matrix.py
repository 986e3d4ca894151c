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
EXCHANGED = [layout for layout in LAYOUTS if layout.world_size in (1, 2, 4)]
# What `make test` takes of them: a sharded one of every engine that shards.
SHORT = [layout for layout in EXCHANGED if (layout.zero_stage, layout.world_size) == (3, 2)]


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


def trained(world: World, layout: Layout, root: str) -> Curve:
    """Takes a few steps and saves; returns the twenty that follow."""
    engine = lockstep_engine(world, layout, "gpt", "adamw")
    take_steps(engine, "gpt", 2, TAKEN)
    save(engine, root)
    return take_steps(engine, "gpt", 2)


def loaded_and_saved(world: World, layout: Layout, root: str, again: str) -> Curve:
    """Takes a checkpoint over and saves it again; returns the twenty steps that follow."""
    engine = lockstep_engine(world, layout, "gpt", "adamw")
    load(engine, root)
    save(engine, again)
    return take_steps(engine, "gpt", 2)


def tensors_of(root: str) -> dict[str, torch.Tensor]:
    engine = lockstep_engine(ALONE, PLAIN, "gpt", "adamw")
    load(engine, root)
    return {name: tensor.clone() for name, tensor in engine.canonical_state().tensors.items()}


def assert_agree(found: Curve, expected: Curve) -> None:
    assert found.digest == expected.digest
    assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert found.gradient_norms == pytest.approx(expected.gradient_norms, rel=NORM_TOLERANCE)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, marks=() if layout in SHORT else pytest.mark.long) for layout in EXCHANGED],
    ids=lambda layout: f"{layout.name}, world {layout.world_size}",
)
def test_checkpoints_pass_between_all_engines(gloo_pool: WorkerPool, tmp_path: Path, layout: Layout) -> None:
    reference, again, own = (str(tmp_path / name) for name in ("reference", "again", "own"))
    expected = trained(ALONE, PLAIN, reference)
    assert_agree(gloo_pool.run(loaded_and_saved, layout.world_size, layout, reference, again)[0], expected)
    before, after = tensors_of(reference), tensors_of(again)
    assert before.keys() == after.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)

    there = gloo_pool.run(trained, layout.world_size, layout, own)[0]
    assert_agree(loaded_and_saved(ALONE, PLAIN, own, again), there)
