"""Checkpoints: complete and verified, or not there; the same bytes every time; readable at any world size."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distrib.checkpoint import (
    SaveFailed,
    load_tensors,
    newest_good_checkpoint,
    open_checkpoint,
    read_newest_good,
    save_checkpoint,
)
from distrib.config import CheckpointConfig, OptimizerConfig
from distrib.engine import CanonicalState
from distrib.manifest import BadCheckpoint, checkpoint_name, published_checkpoints, remove_temporaries
from distrib.native import NativeEngine
from distrib.world import World, single_process_world
from tests.distrib.engine_runs import ADAMW_CLIPPED, MODEL, SGD_UNCLIPPED, make_engine, take_step
from tests.worker_pool import WorkerPool

CONFIG = CheckpointConfig()
ALONE = single_process_world("cpu")


def save(engine: NativeEngine, root: Path, step: int, config: CheckpointConfig = CONFIG) -> Path:
    return save_checkpoint(
        root,
        engine.canonical_state(),
        step=step,
        scalars={"ledger": {"step": step}},
        fields={"world": engine.world.size, "engine": "native"},
        config=config,
        world=engine.world,
    )


def load(engine: NativeEngine, path: Path) -> None:
    checkpoint = open_checkpoint(path, engine.world)
    tensors = engine.canonical_state().tensors
    load_tensors(checkpoint, tensors, engine.world)
    engine.load_state(CanonicalState(tensors, checkpoint.scalars["engine"]))


def _train_and_save(world: World, root: str, optimizer: OptimizerConfig) -> dict[str, torch.Tensor]:
    engine = make_engine(world, optimizer)
    for step in range(3):
        take_step(engine, step, 7)
    save(engine, Path(root), 3)
    return {name: tensor.clone() for name, tensor in engine.canonical_state().tensors.items()}


def _load(world: World, path: str, optimizer: OptimizerConfig) -> tuple[dict[str, torch.Tensor], dict]:
    engine = make_engine(world, optimizer)
    load(engine, Path(path))
    state = engine.canonical_state()
    return {name: tensor.clone() for name, tensor in state.tensors.items()}, state.scalars


@pytest.mark.parametrize("optimizer", [ADAMW_CLIPPED, SGD_UNCLIPPED], ids=lambda o: o.kind)
@pytest.mark.parametrize(("saved_at", "loaded_at"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_every_tensor_is_bit_equal_at_any_world_size(
    gloo_pool: WorkerPool, tmp_path: Path, saved_at: int, loaded_at: int, optimizer: OptimizerConfig
) -> None:
    saved = gloo_pool.run(_train_and_save, saved_at, str(tmp_path), optimizer)[0]
    for tensors, scalars in gloo_pool.run(_load, loaded_at, str(tmp_path / "step-00000003"), optimizer):
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[name], saved[name]) for name in saved)
        assert scalars == {
            "steps_done": 3, "optimizer_updates": 3 if optimizer.kind == "adamw" else 0
        }  # fmt: skip


def test_files_are_plain_safetensors_under_full_names_with_nothing_twice(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    saved = gloo_pool.run(_train_and_save, 2, str(tmp_path), ADAMW_CLIPPED)[0]
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "step-00000003").glob("*.safetensors"):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    name = next(name for name in found if name.startswith("model."))
    assert {name.replace("model.", f"optimizer.{state}.", 1) for state in ("exp_avg", "exp_avg_sq")} <= found.keys()


def test_the_same_state_is_written_as_the_same_bytes_by_other_processes(gloo_pool: WorkerPool, tmp_path: Path) -> None:
    script = (
        "from tests.distrib.test_checkpoint import _train_and_save, ALONE, ADAMW_CLIPPED; import sys;"
        "_train_and_save(ALONE, sys.argv[1], ADAMW_CLIPPED)"
    )
    for number in (1, 2):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / str(number))], check=True, cwd=Path(__file__).parents[2]
        )
    first, second = (sorted((tmp_path / n / "step-00000003").iterdir()) for n in ("1", "2"))
    assert [path.name for path in first] == [path.name for path in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published checkpoints of a few hundred bytes, of steps 1 and 2."""
    root = tmp_path_factory.mktemp("tiny")
    state = make_engine(ALONE, ADAMW_CLIPPED).canonical_state()
    name = "model.final_norm.weight" if "model.final_norm.weight" in state.tensors else sorted(state.tensors)[-1]
    state.tensors = {name: state.tensors[name][:3].clone()}
    for step in (1, 2):
        save_checkpoint(root, state, step=step, scalars={}, fields={}, config=CONFIG, world=ALONE)
    return root


def test_every_flipped_byte_is_detected_and_the_previous_checkpoint_used(tiny_checkpoint: Path, tmp_path: Path) -> None:
    newest = tiny_checkpoint / "step-00000002"
    files = sorted(newest.iterdir())
    assert [path.name for path in files] == ["MANIFEST.json", "model-00001.safetensors", "state.json"]
    for path in files:
        original = path.read_bytes()
        for offset in range(len(original)):
            damaged = bytearray(original)
            damaged[offset] ^= 1 << (offset % 8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="step-00000002"):
                open_checkpoint(newest, ALONE)
        path.write_bytes(original)
    open_checkpoint(newest, ALONE)

    root = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, root)
    damaged_file = root / "step-00000002" / "model-00001.safetensors"
    damaged_file.write_bytes(damaged_file.read_bytes()[:-1] + b"\x55")
    found, passed_over = newest_good_checkpoint(root, ALONE)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert [bad.path.name for bad in passed_over] == ["step-00000002.corrupt"]
    assert "model-00001.safetensors: its bytes changed" in passed_over[0].reason
    assert published_checkpoints(root) == [root / "step-00000001"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "state.json").unlink(), "state.json: missing"),
        (lambda path: (path / "MANIFEST.json").unlink(), "no MANIFEST.json"),
        (lambda path: (path / "extra.bin").write_bytes(b"x"), "does not list: extra.bin"),
        (lambda path: os.truncate(path / "model-00001.safetensors", 40), "40 bytes, the manifest says"),
    ],
)
def test_missing_extra_and_truncated_files_are_named(
    tiny_checkpoint: Path, tmp_path: Path, damage, reason: str
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "root")
    damage(tmp_path / "root" / "step-00000002")
    found, passed_over = newest_good_checkpoint(tmp_path / "root", ALONE)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert reason in passed_over[0].reason


def test_a_manifest_never_leads_out_of_its_directory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from distrib.manifest import canonical_json, read_manifest, write_manifest

    shutil.copytree(tiny_checkpoint, tmp_path / "root")
    path = tmp_path / "root" / "step-00000002"
    manifest = read_manifest(path)
    files = manifest.pop("files")
    (tmp_path / "root" / "secret").write_bytes(b"x")
    files["../secret"] = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    write_manifest(path, {k: v for k, v in manifest.items() if k != "format_version"}, files)
    assert canonical_json(read_manifest(path)["files"]) == canonical_json(files)
    with pytest.raises(BadCheckpoint, match="not a plain file name"):
        open_checkpoint(path, ALONE)


def test_a_newer_format_is_refused_and_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from distrib.manifest import write_manifest

    shutil.copytree(tiny_checkpoint, tmp_path / "root")
    path = tmp_path / "root" / "step-00000002"
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    write_manifest(path, {"format_version": 2}, files)
    with pytest.raises(ValueError, match="version 2 is newer than this Lockstep reads"):
        newest_good_checkpoint(tmp_path / "root", ALONE)
    assert path.exists()


def test_a_checkpoint_of_another_model_is_refused_with_the_names_that_differ(tmp_path: Path) -> None:
    path = save(make_engine(ALONE, ADAMW_CLIPPED), tmp_path, 1)
    deeper = make_engine(ALONE, ADAMW_CLIPPED, model=MODEL.model_copy(update={"layers": 3}))
    with pytest.raises(ValueError, match=r"not a checkpoint of this model.*it lacks .*layers\.2\."):
        load(deeper, path)
    wider = make_engine(ALONE, ADAMW_CLIPPED, model=MODEL.model_copy(update={"width": 64}))
    with pytest.raises(ValueError, match=r"final_norm.weight is \[32\] there and \[64\] here"):
        load(wider, path)
    with pytest.raises(ValueError, match=r"optimizer\.momentum_buffer"):
        load(make_engine(ALONE, SGD_UNCLIPPED), path)


def test_retention_keeps_the_last_and_the_multiples(tmp_path: Path) -> None:
    engine = make_engine(ALONE, SGD_UNCLIPPED)
    config = CheckpointConfig(keep_last=2, keep_every_steps=4)
    for step in range(1, 8):
        save(engine, tmp_path, step, config)
    assert [path.name for path in published_checkpoints(tmp_path)] == [
        "step-00000007", "step-00000006", "step-00000004"
    ]  # fmt: skip
    assert not list(tmp_path.glob(".tmp-*"))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    engine = make_engine(ALONE, SGD_UNCLIPPED)
    save(engine, tmp_path, 1)
    take_step(engine, 0, 7)
    path = save(engine, tmp_path, 1)
    assert list(tmp_path.iterdir()) == [path]
    assert open_checkpoint(path, ALONE).scalars["engine"]["steps_done"] == 1


def _save_with_no_room(world: World, root: str) -> str:
    engine = make_engine(world, ADAMW_CLIPPED)
    save(engine, Path(root), 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        save(engine, Path(root), 2)
    except SaveFailed as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "saved"


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_room_on_one_rank_fails_the_save_on_all_and_leaves_the_earlier_one(
    gloo_pool: WorkerPool, tmp_path: Path, world_size: int
) -> None:
    for message in gloo_pool.run(_save_with_no_room, world_size, str(tmp_path)):
        assert "no room for a checkpoint" in message
        assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    open_checkpoint(tmp_path / "step-00000001", ALONE)


def test_a_reader_looks_again_where_a_checkpoint_was_retired_meanwhile(tiny_checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_checkpoint / "step-00000001", root / "step-00000001")
    doomed = root / "step-00000003"
    doomed.mkdir()
    os.mkfifo(doomed / "MANIFEST.json")  # its reader waits until somebody opens it for writing

    def publish_another_and_retire() -> None:
        with (doomed / "MANIFEST.json").open("w"):
            shutil.copytree(tiny_checkpoint / "step-00000002", root / "step-00000002")
            doomed.rename(tmp_path / "retired")

    run = threading.Thread(target=publish_another_and_retire)
    run.start()
    found, passed_over = read_newest_good(root, ALONE)
    run.join()
    assert found is not None
    assert found.path.name == "step-00000002"
    assert not passed_over


def test_a_reader_renames_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_checkpoint, tmp_path / "root")
    (root / "step-00000002" / "state.json").write_text("{}")
    found, passed_over = read_newest_good(root, ALONE)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert [bad.path for bad in passed_over] == [root / "step-00000002"]
    assert (root / "step-00000002").is_dir()


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step-00000000").write_text("a file where a directory should be")
    engine = make_engine(ALONE, SGD_UNCLIPPED)
    for step in (1, 2):
        open_checkpoint(save(engine, tmp_path, step, CheckpointConfig(keep_last=2)), ALONE)
    assert "an old checkpoint could not be deleted (Not a directory)" in caplog.text


def kill_again_and_again(script: str, root: Path) -> None:
    """Kills a process that saves step after step, four times; whatever is published verifies, the rest can be cleared.
    The script's arguments: `root`, and the step to begin with."""
    seen = 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(root), str(1000 * attempt + 1)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        process.stdout.readline()
        try:
            _wait_for_save(process, root, 1000 * attempt + 1)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.2 + 0.0137 * attempt)
        finally:
            process.kill()
            process.wait()
        found = published_checkpoints(root)
        for path in found:
            open_checkpoint(path, ALONE)
        seen += len(found)
    assert seen
    remove_temporaries(root)
    assert all(path.name.startswith("step-") for path in root.iterdir())


def _wait_for_save(process: subprocess.Popen[bytes], root: Path, step: int) -> None:
    """Until a checkpoint of this step or a later one is there."""
    deadline = time.monotonic() + 120
    while not [path for path in published_checkpoints(root) if path.name >= checkpoint_name(step)]:
        assert process.poll() is None
        assert time.monotonic() < deadline, "no checkpoint was published"
        time.sleep(0.001)


def test_a_kill_at_any_moment_of_a_save_never_shows_a_half_checkpoint(tmp_path: Path) -> None:
    script = (
        "from tests.distrib.test_checkpoint import *; root = Path(sys.argv[1]); engine = make_engine(ALONE, ADAMW_CLIPPED)\n"
        "print('ready', flush=True)\n"
        "for step in range(int(sys.argv[2]), 10**6): save(engine, root, step)"
    )
    kill_again_and_again(script, tmp_path)
