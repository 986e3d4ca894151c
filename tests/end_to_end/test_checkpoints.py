"""A damaged checkpoint is told, put aside and passed over; one that does not fit is refused, and nothing is lost."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrib.checkpoint import newest_good_checkpoint, open_checkpoint
from distrib.manifest import BadCheckpoint, write_manifest
from distrib.world import single_process_world
from tests.end_to_end.runs import WarmProcess, checkpoints, digests, final_bytes, history, lockstep

WORLD = single_process_world("cpu")


@pytest.fixture
def run(straight_run: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished run of one worker, of 40 steps, with the checkpoints of steps 35 and 40; the test's own copy."""
    copy = tmp_path / "run"
    shutil.copytree(straight_run(1), copy)
    assert checkpoints(copy) == ["step-00000035", "step-00000040"]
    return copy


def newest(run: Path) -> Path:
    return run / "checkpoints" / checkpoints(run)[-1]


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def sampled_offsets(size: int, choose: random.Random) -> list[int]:
    """The first bytes, the last, some of the header and some of the rest."""
    return sorted(
        {0, 1, 7, 8, 9, size - 1, *(choose.randrange(min(size, 400)) for _ in range(4)), choose.randrange(size)}
    )


def assert_every_flip_is_seen(checkpoint: Path, offsets: Callable[[int], list[int]], bits: list[int]) -> None:
    open_checkpoint(checkpoint, WORLD)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for offset in offsets(len(content)):
            for bit in bits:
                flip(path, offset, bit)
                with pytest.raises(BadCheckpoint) as refused:
                    open_checkpoint(checkpoint, WORLD)
                assert str(checkpoint) in str(refused.value)
                assert "\n" not in str(refused.value)
                path.write_bytes(content)
    open_checkpoint(checkpoint, WORLD)


def test_a_flipped_bit_anywhere_is_seen(run: Path) -> None:
    names = {path.name for path in newest(run).iterdir()}
    assert names == {"MANIFEST.json", "state.json", "model-00001.safetensors", "optimizer-00001.safetensors"}
    choose = random.Random(5)
    assert_every_flip_is_seen(newest(run), lambda size: sampled_offsets(size, choose), [0, 5])


@pytest.mark.long
def test_every_flipped_byte_of_a_small_checkpoint_is_seen(
    warm: WarmProcess, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from tests.end_to_end.runs import write_recipe

    values = recipe_values(run={"steps": 1}, model={"layers": 1, "width": 2, "heads": 1, "feed_forward_width": 2})
    recipe = write_recipe(tmp_path / "small.yaml", values)
    warm.worker(recipe, "run.directory=run", cwd=tmp_path).succeeded()
    assert_every_flip_is_seen(newest(tmp_path / "run"), lambda size: list(range(size)), [3])


@pytest.mark.parametrize("change", ["truncated", "grown", "missing", "extra", "emptied", "no manifest", "swapped"])
def test_a_changed_checkpoint_is_passed_over_and_kept_aside(change: str, run: Path) -> None:
    damaged = newest(run)
    weights = damaged / "model-00001.safetensors"
    match change:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "grown":
            weights.write_bytes(weights.read_bytes() + b"\0")
        case "missing":
            weights.unlink()
        case "extra":
            (damaged / "model-00002.safetensors").write_bytes(weights.read_bytes())
        case "emptied":
            (damaged / "state.json").write_bytes(b"")
        case "no manifest":
            (damaged / "MANIFEST.json").unlink()
        case "swapped":
            shutil.copy(run / "checkpoints" / "step-00000035" / weights.name, weights)
    found, passed_over = newest_good_checkpoint(run / "checkpoints", WORLD)
    assert found is not None
    assert found.path.name == "step-00000035"
    [bad] = passed_over
    assert bad.path.name == "step-00000040.corrupt"
    assert bad.path.is_dir()
    assert not damaged.exists()
    assert str(damaged) in bad.reason


def test_a_manifest_that_names_files_elsewhere_is_refused(run: Path) -> None:
    damaged = newest(run)
    manifest = json.loads((damaged / "MANIFEST.json").read_bytes())
    files = {"../../run.json": {"bytes": 1, "sha256": "0" * 64}, **manifest.pop("files")}
    for key in ("manifest_sha256", "format_version"):
        manifest.pop(key)
    write_manifest(damaged, manifest, files)
    with pytest.raises(BadCheckpoint, match="not a plain file name"):
        open_checkpoint(damaged, WORLD)


def test_training_goes_on_from_the_previous_checkpoint_to_the_same_end(
    warm: WarmProcess, run: Path, recipe: Path, straight_run: Callable[..., Path]
) -> None:
    flip(newest(run) / "optimizer-00001.safetensors", 5000, bit=2)
    resumed = warm.worker(recipe, f"run.directory={run}", "--resume", "auto", cwd=run.parent).succeeded()
    assert "passed over a checkpoint: " in resumed.err + resumed.out
    assert "optimizer-00001.safetensors: its bytes changed" in resumed.err + resumed.out
    assert "resumed from step 35" in resumed.err + resumed.out
    assert (run / "checkpoints" / "step-00000040.corrupt").is_dir()
    assert final_bytes(run) == final_bytes(straight_run(1))
    assert history(run) == history(straight_run(1))


@pytest.mark.parametrize("mixed", ["weights of an earlier step", "all files of an earlier step", "half-written"])
def test_a_directory_of_mixed_files_is_told_and_the_newest_good_one_used(
    warm: WarmProcess, run: Path, recipe: Path, straight_run: Callable[..., Path], mixed: str
) -> None:
    damaged, earlier = newest(run), run / "checkpoints" / "step-00000035"
    match mixed:
        case "weights of an earlier step":
            shutil.copy(earlier / "model-00001.safetensors", damaged)
            named = "model-00001.safetensors: its bytes changed"
        case "all files of an earlier step":
            shutil.copytree(earlier, damaged, dirs_exist_ok=True)
            named = "MANIFEST.json: is of step 35; files of two checkpoints were mixed"
        case "half-written":
            for name in ("MANIFEST.json", "state.json"):
                (damaged / name).unlink()
            named = "no MANIFEST.json"
    resumed = warm.worker(recipe, f"run.directory={run}", "--resume", "auto", cwd=run.parent).succeeded()
    [told] = [line for line in resumed.err.splitlines() if line.startswith("passed over a checkpoint: ")]
    assert str(damaged) in told
    assert named in told
    assert told.endswith("; kept as step-00000040.corrupt")
    assert "resumed from step 35" in resumed.err
    assert final_bytes(run) == final_bytes(straight_run(1))


def test_a_run_whose_checkpoints_are_all_corrupt_does_not_start_over(
    warm: WarmProcess, run: Path, recipe: Path
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    for name in checkpoints(run):
        flip(run / "checkpoints" / name / "state.json", 3)
    ended = warm.worker(recipe, f"run.directory={run}", "--resume", "auto", cwd=run.parent)
    ended.failed_with(78, "checkpoints exist and none verifies", "restore one, or start a new run")
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 78
    assert (run / "metrics.jsonl").read_bytes() == before
    # Nor at the second try, when only the renamed ones are left.
    again = warm.worker(recipe, f"run.directory={run}", "--resume", "auto", cwd=run.parent)
    again.failed_with(78, "none verifies")


def test_a_named_checkpoint_that_is_corrupt_is_not_replaced_by_another(
    warm: WarmProcess, run: Path, recipe: Path
) -> None:
    flip(newest(run) / "state.json", 3)
    ended = warm.worker(recipe, "--resume", newest(run), cwd=run.parent)
    ended.failed_with(78, "state.json", "its bytes changed")
    assert checkpoints(run) == ["step-00000035", "step-00000040"]


def rewrite_manifest(checkpoint: Path, **fields: Any) -> None:
    """Changes a manifest's fields, with the right hash, as another version of the program would have written it."""
    import hashlib

    from distrib.manifest import canonical_json

    manifest = {**json.loads((checkpoint / "MANIFEST.json").read_bytes()), **fields}
    manifest.pop("manifest_sha256")
    manifest["manifest_sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def test_a_checkpoint_of_a_newer_version_is_left_alone(warm: WarmProcess, run: Path, recipe: Path) -> None:
    rewrite_manifest(newest(run), format_version=2)
    ended = warm.worker(recipe, f"run.directory={run}", "--resume", "auto", cwd=run.parent)
    ended.failed_with(2, "format version 2 is newer", "upgrade Lockstep")
    assert checkpoints(run) == ["step-00000035", "step-00000040"]


def test_a_checkpoint_of_another_model_names_what_differs(
    warm: WarmProcess, run: Path, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from launch.recipe import load_recipe
    from tests.end_to_end.runs import write_recipe

    before = final_bytes(run)
    wider = write_recipe(tmp_path / "wider.yaml", recipe_values(model={"width": 64}))
    deeper = write_recipe(tmp_path / "deeper.yaml", recipe_values(model={"layers": 3}))
    ended = warm.worker(wider, "run.directory=new", "--resume", newest(run), cwd=tmp_path)
    ended.failed_with(2, "impossible: model.width: 32 -> 64", "start a new run")
    # Where the recipes agree (a user's own model may change its code), the tensors alone must show it.
    rewrite_manifest(newest(run), resolved_recipe=load_recipe(str(wider)).model_dump(mode="json"))
    ended = warm.worker(wider, "run.directory=new", "--resume", newest(run), cwd=tmp_path)
    ended.failed_with(2, "not a checkpoint of this model", "is [", "there and [")
    rewrite_manifest(newest(run), resolved_recipe=load_recipe(str(deeper)).model_dump(mode="json"))
    ended = warm.worker(deeper, "run.directory=new2", "--resume", newest(run), cwd=tmp_path)
    ended.failed_with(2, "not a checkpoint of this model", "it lacks ", " more")
    assert final_bytes(run) == before


def test_a_checkpoint_of_another_optimizer_is_refused(
    warm: WarmProcess, run: Path, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from tests.end_to_end.runs import write_recipe

    sgd = write_recipe(tmp_path / "sgd.yaml", recipe_values(optimizer={"kind": "sgd"}))
    ended = warm.worker(sgd, f"run.directory={run}", "--resume", "auto", cwd=tmp_path)
    ended.failed_with(2, "optimizer.kind: adamw -> sgd", "start a new run")


def test_a_recipe_is_held_to_that_of_the_checkpoint_itself(
    warm: WarmProcess, run: Path, recipe: Path, tmp_path: Path
) -> None:
    """Not to that of the run, which may have changed since, or lie elsewhere."""
    slower = ["optimizer.lr=1e-5", "run.steps=44"]
    refusal = ("needs --allow-change: ", "optimizer.lr: 0.001 -> 1e-05", "run.steps: 40 -> 44")
    copy = tmp_path / newest(run).name
    shutil.copytree(newest(run), copy)
    warm.worker(recipe, "run.directory=a", "--resume", copy, *slower, cwd=tmp_path).failed_with(2, *refusal)
    warm.worker(recipe, "run.directory=a", "--resume", copy, "run.seed=9", cwd=tmp_path).failed_with(
        2, "impossible: run.seed: "
    )
    warm.worker(
        recipe, f"run.directory={run}", "--resume", "auto", *slower, "--allow-change", cwd=run.parent
    ).succeeded()
    earlier = run / "checkpoints" / "step-00000040"
    warm.worker(recipe, "run.directory=b", "--resume", earlier, *slower, cwd=tmp_path).failed_with(2, *refusal)


def test_a_run_that_began_from_another_never_starts_again_at_zero(
    warm: WarmProcess, run: Path, recipe: Path, tmp_path: Path
) -> None:
    """Ended before its first own checkpoint, it has nothing to continue from but what it began from."""
    origin = newest(run)
    warm.worker(recipe, "run.directory=fork", "--resume", origin, "run.steps=41", "--allow-change", cwd=tmp_path)
    shutil.rmtree(tmp_path / "fork" / "checkpoints")
    ended = warm.worker(
        recipe, "run.directory=fork", "--resume", "auto", "run.steps=41", "--allow-change", cwd=tmp_path
    )
    ended.failed_with(78, f"fork: began from {origin}", f"--resume {origin} and a new run.directory")


def test_the_global_batch_may_change_on_the_way(
    warm: WarmProcess, run: Path, recipe: Path, straight_run: Callable[..., Path]
) -> None:
    """With permission; the samples go on where they were, in the order they have."""
    arguments = [recipe, f"run.directory={run}", "--resume", "auto", "run.steps=44"]
    refused = warm.worker(*arguments, "batch.global_samples=18", cwd=run.parent)
    refused.failed_with(2, "batch.global_samples: 12 -> 18", "run.steps: 40 -> 44", "--allow-change")
    warm.worker(*arguments, "batch.global_samples=18", "--allow-change", cwd=run.parent).succeeded()
    assert history(run)[:40] == history(straight_run(1))
    assert [row[1] for row in history(run)[39:]] == [480, 498, 516, 534, 552]
    state = json.loads((newest(run) / "state.json").read_text())
    segments = [(s["start_position"], s["global_samples"]) for s in state["plan"]["segments"]]
    assert segments == [(0, 12), (480, 18)]


def test_fewer_steps_than_are_done_are_refused(warm: WarmProcess, run: Path, recipe: Path) -> None:
    ended = warm.worker(recipe, f"run.directory={run}", "--resume", "auto", "run.steps=20", "--allow-change",
        cwd=run.parent,
    )  # fmt: skip
    ended.failed_with(2, "run.steps=20", "has done 40 already")


def test_a_checkpoint_continues_at_another_world_size(
    run: Path, recipe: Path, straight_run: Callable[..., Path], tmp_path: Path
) -> None:
    """The same samples in the same order: the digests go on as if nothing had changed."""
    shutil.rmtree(newest(run))
    lockstep("train", recipe, f"run.directory={run}", "--resume", "auto", "--workers", 3, cwd=run.parent).succeeded()
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert [(a["world_size"], a["resumed_from_step"]) for a in attempts] == [(1, None), (3, 35)]
    assert digests(run) == digests(straight_run(1))
