"""Checkpoints that must not be used, at two workers: all of them say so, with the names that differ, and take the one before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distrib.checkpoint import load_tensors, newest_good_checkpoint, open_checkpoint, save_checkpoint
from distrib.config import CheckpointConfig
from distrib.engine import CanonicalState
from distrib.manifest import BadCheckpoint, write_manifest
from distrib.world import World, single_process_world
from tests.distrib.engine_runs import ADAMW_CLIPPED, SGD_UNCLIPPED, make_engine, take_step
from tests.distrib.test_sharding import mesh_of, save_step
from tests.worker_pool import WorkerPool

ALONE = single_process_world("cpu")


def _save_two(world: World, root: str) -> None:
    engine = make_engine(mesh_of(world, 3), ADAMW_CLIPPED, zero_stage=3)
    for step in (1, 2):
        take_step(engine, step, 7)
        save_step(engine, root, step)


def _newest(world: World, root: str) -> tuple[str | None, list[tuple[str, str]]]:
    found, passed_over = newest_good_checkpoint(Path(root), world)
    return found.path.name if found else None, [(bad.path.name, bad.reason) for bad in passed_over]


@pytest.fixture
def root(gloo_pool: WorkerPool, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2, each of two workers at ZeRO stage 3."""
    gloo_pool.run(_save_two, 2, str(tmp_path))
    return tmp_path


def replace(name: str) -> Callable[[Path, Path], None]:
    return lambda bad, earlier: shutil.copy(earlier / name, bad / name)  # type: ignore[return-value]


def remove(*names: str) -> Callable[[Path, Path], None]:
    return lambda bad, earlier: [(bad / name).unlink() for name in names]  # type: ignore[return-value]


def add_third_rank(bad: Path, earlier: Path) -> None:
    shutil.copy(earlier / "model-00002.safetensors", bad / "model-00003.safetensors")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (replace("model-00001.safetensors"), "/model-00001.safetensors: its bytes changed"),
        (replace("optimizer-00002.safetensors"), "/optimizer-00002.safetensors: its bytes changed"),
        (replace("state.json"), "/state.json: its bytes changed"),
        (replace("MANIFEST.json"), "/MANIFEST.json: is of step 1; files of two checkpoints were mixed"),
        (add_third_rank, ": holds files that its manifest does not list: model-00003.safetensors"),
        (remove("model-00002.safetensors"), "/model-00002.safetensors: missing"),
        (remove("MANIFEST.json", "state.json"), ": no MANIFEST.json; it is not a checkpoint of Lockstep"),
    ],
)
def test_all_workers_pass_it_over_and_say_which_file(
    gloo_pool: WorkerPool, root: Path, damage: Callable[[Path, Path], None], reason: str
) -> None:
    bad = root / "step-00000002"
    damage(bad, root / "step-00000001")
    answers = gloo_pool.run(_newest, 2, str(root))
    assert answers[0] == answers[1]
    found, [(name, told)] = answers[0]
    assert (found, name) == ("step-00000001", "step-00000002.corrupt")
    assert told.startswith(str(bad) + reason)


def take_out(path: Path, without: str) -> None:
    """Takes a file out of a checkpoint, and out of its manifest."""
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    (path / without).unlink()
    files = {name: record for name, record in manifest["files"].items() if name != without}
    write_manifest(path, {"step": manifest["step"]}, files)


def _load_refused(world: World, path: str) -> str:
    engine = make_engine(mesh_of(world, 3), ADAMW_CLIPPED, zero_stage=3)
    with pytest.raises(BadCheckpoint) as refused:
        load_tensors(open_checkpoint(Path(path), world), engine.canonical_state().tensors, world)
    return str(refused.value)


@pytest.mark.parametrize("without", ["model-00001.safetensors", "optimizer-00001.safetensors"])
def test_a_missing_piece_is_never_left_as_it_was(gloo_pool: WorkerPool, root: Path, without: str) -> None:
    """Though all that the manifest lists verifies."""
    path = root / "step-00000002"
    take_out(path, without)
    for told in gloo_pool.run(_load_refused, 2, str(path)):
        assert told.startswith(f"{path}: holds only pieces of {without.partition('-')[0]}.")
        assert " more" in told


def test_missing_and_additional_tensors_are_named(tmp_path: Path) -> None:
    engine = make_engine(ALONE, ADAMW_CLIPPED)
    tensors = dict(engine.canonical_state().tensors)
    name = sorted(name for name in tensors if name.startswith("model."))[0]
    tensors["model.what_is_this"] = tensors.pop(name)
    state = CanonicalState(tensors, {})
    path = save_checkpoint(tmp_path, state, step=1, scalars={}, fields={}, config=CheckpointConfig(), world=ALONE)
    before = {name: tensor.clone() for name, tensor in engine.canonical_state().tensors.items()}
    with pytest.raises(ValueError, match=f"it lacks {name}; it also has model.what_is_this$") as refused:
        load_tensors(open_checkpoint(path, ALONE), engine.canonical_state().tensors, ALONE)
    assert str(path) in str(refused.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.canonical_state().tensors.items())


def test_the_state_of_another_optimizer_is_named(tmp_path: Path) -> None:
    save_step(make_engine(ALONE, SGD_UNCLIPPED), str(tmp_path), 1)
    tensors = make_engine(ALONE, ADAMW_CLIPPED).canonical_state().tensors
    with pytest.raises(
        ValueError, match=r"it lacks optimizer\.exp_avg\..* more; it also has optimizer\.momentum_buffer\..* more"
    ):
        load_tensors(open_checkpoint(tmp_path / "step-00000001", ALONE), tensors, ALONE)
