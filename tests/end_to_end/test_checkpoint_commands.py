"""`lockstep checkpoint verify|list|export`: what they say of good and of bad checkpoints; they alter nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import distrib.export
import launch.checkpoints
from distrib.checkpoint import Checkpoint
from launch.cli import main
from tests.end_to_end.runs import WarmProcess, checkpoints


@pytest.fixture
def run(straight_run: Callable[..., Path], tmp_path: Path) -> Path:
    """The test's own copy of a finished run with the checkpoints of steps 35 and 40."""
    return shutil.copytree(straight_run(1), tmp_path / "run")


def damage(checkpoint: Path) -> None:
    path = checkpoint / "optimizer-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def test_verify_reads_every_checkpoint_and_renames_nothing(warm: WarmProcess, run: Path) -> None:
    newest, older = (f"run/checkpoints/step-{step:08d}" for step in (40, 35))
    good = warm.lockstep("checkpoint", "verify", "run", cwd=run.parent).succeeded()
    assert good.out.splitlines() == [f"{newest}: good", f"{older}: good"]
    damage(run.parent / newest)
    before = names(run)
    bad = warm.lockstep("checkpoint", "verify", "run", cwd=run.parent)
    assert bad.code == 78
    told = f"{newest}: BAD: {newest}/optimizer-00001.safetensors: its bytes changed since they were written (sha256 differs)"
    assert bad.out.splitlines() == [told, f"{older}: good"]
    assert warm.lockstep("checkpoint", "verify", older, cwd=run.parent).succeeded().out == f"{older}: good\n"
    assert warm.lockstep("checkpoint", "verify", newest, cwd=run.parent).code == 78
    (run.parent / newest / "MANIFEST.json").unlink()
    half = warm.lockstep("checkpoint", "verify", newest, cwd=run.parent)
    assert half.code == 78
    assert "BAD: " in half.out
    assert "no MANIFEST.json" in half.out
    assert names(run) == before - {f"checkpoints/{checkpoints(run)[-1]}/MANIFEST.json"}


def test_list_names_everything_there(warm: WarmProcess, run: Path) -> None:
    root = run / "checkpoints"
    shutil.copytree(root / "step-00000035", root / "step-00000020.corrupt")
    (root / ".tmp-step-00000045-0123456789ab").mkdir()
    (root / "step-00000035" / "state.json").write_text("{}")
    shown = warm.lockstep("checkpoint", "list", "run", cwd=run.parent).succeeded().out.splitlines()
    assert shown[0].split() == ["checkpoint", "step", "position", "world", "engine", "bytes", "date", "state"]
    manifest = json.loads((root / "step-00000040" / "MANIFEST.json").read_text())
    total = sum(file["bytes"] for file in manifest["files"].values())
    newest, older, corrupt, temporary, remark = shown[1:]
    assert newest.split()[:6] == ["step-00000040", "40", "480", "1", "native", f"{total:,}"]
    assert newest.endswith("  complete")
    assert older.split()[:2] == ["step-00000035", "35"]
    assert "BAD: run/checkpoints/step-00000035/state.json: 2 bytes, the manifest says" in older
    assert corrupt.split(maxsplit=1) == ["step-00000020.corrupt", "put aside: it failed verification"]
    assert temporary.split(maxsplit=1) == [".tmp-step-00000045-0123456789ab", "not published"]
    assert remark == "contents were not read; `lockstep checkpoint verify run` reads them"


def test_export_of_a_run_takes_its_newest_good_checkpoint(warm: WarmProcess, run: Path) -> None:
    out = warm.lockstep("checkpoint", "export", "run", "--out", "weights", cwd=run.parent).succeeded().out
    assert out.endswith(f"from {run.name}/checkpoints/step-00000040\n")
    assert [path.name for path in (run.parent / "weights").iterdir()] == ["model.safetensors"]
    occupied = warm.lockstep("checkpoint", "export", "run", "--out", "weights", cwd=run.parent)
    occupied.failed_with(2, "--out weights: is there already")

    damage(run / "checkpoints" / "step-00000040")
    passed = warm.lockstep("checkpoint", "export", "run", "--out", "older", cwd=run.parent).succeeded()
    assert "passed over a checkpoint: " in passed.err
    assert "checkpoints/step-00000035\n" in passed.out
    named = warm.lockstep("checkpoint", "export", run / "checkpoints" / "step-00000040", "--out", "x", cwd=run.parent)
    named.failed_with(78, "its bytes changed")
    damage(run / "checkpoints" / "step-00000035")
    none = warm.lockstep("checkpoint", "export", "run", "--out", "x", cwd=run.parent)
    none.failed_with(78, "run: no good checkpoint")
    assert not (run.parent / "x").exists()
    assert checkpoints(run) == ["step-00000035", "step-00000040"]


def test_a_checkpoint_that_a_live_run_retires_is_listed_as_gone_and_a_newer_one_exported(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes once it is found good, and before its files are looked at."""
    newest = run / "checkpoints" / "step-00000040"
    look, write = launch.checkpoints.read_manifest, distrib.export.export_weights

    def look_and_retire(checkpoint: Path) -> dict[str, Any]:
        manifest = look(checkpoint)
        if checkpoint == newest:
            newest.rename(run / "retired")
        return manifest

    def retire_and_write(checkpoint: Checkpoint, out: Path) -> distrib.export.Exported:
        if checkpoint.path == newest:
            newest.rename(run / "retired")
        return write(checkpoint, out)

    with monkeypatch.context() as patch:
        patch.setattr(launch.checkpoints, "read_manifest", look_and_retire)
        assert main(["checkpoint", "list", str(run)]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split(maxsplit=1) == ["step-00000040", "deleted by the run while it was read"]
    (run / "retired").rename(newest)
    with monkeypatch.context() as patch:
        patch.setattr(distrib.export, "export_weights", retire_and_write)
        assert main(["checkpoint", "export", str(run), "--out", str(run / "weights")]) == 0
    assert capsys.readouterr().out.endswith("checkpoints/step-00000035\n")


@pytest.mark.parametrize("action", [["verify"], ["list"], ["export", "--out", "x"]], ids=" ".join)
def test_what_is_no_run_is_named(warm: WarmProcess, action: list[str], tmp_path: Path) -> None:
    ended = warm.lockstep("checkpoint", action[0], "nowhere", *action[1:], cwd=tmp_path)
    ended.failed_with(2, "nowhere: neither a checkpoint (no MANIFEST.json) nor a run")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text("{}")
    ended = warm.lockstep("checkpoint", action[0], "new", *action[1:], cwd=tmp_path)
    ended.failed_with(2, "new: no checkpoint was saved yet")


def test_a_run_whose_checkpoints_were_all_put_aside_has_none_that_verifies(warm: WarmProcess, tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for name in ("step-00000040.corrupt", "step-00000035.corrupt", ".tmp-step-00000045-0123456789ab"):
        (root / name).mkdir(parents=True)
    (root.parent / "run.json").write_text("{}")
    before = names(root.parent)
    for action in (["verify", "run"], ["export", "run", "--out", "x"]):
        ended = warm.lockstep("checkpoint", *action, cwd=tmp_path)
        ended.failed_with(78, "run/checkpoints: checkpoints exist and none verifies; restore one, or start a new run")
    shown = warm.lockstep("checkpoint", "list", "run", cwd=tmp_path).succeeded().out.splitlines()
    assert [line.split(maxsplit=1) for line in shown[1:]] == [
        ["step-00000035.corrupt", "put aside: it failed verification"],
        ["step-00000040.corrupt", "put aside: it failed verification"],
        [".tmp-step-00000045-0123456789ab", "not published"],
    ]
    assert names(root.parent) == before


def test_an_emptied_checkpoint_is_bad_by_its_own_name_and_by_its_run(warm: WarmProcess, tmp_path: Path) -> None:
    named = "run/checkpoints/step-00000009"
    (tmp_path / named).mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    told = f"{named}: BAD: {named}: no MANIFEST.json; it is not a checkpoint of Lockstep\n"
    for path in ("run", named):
        ended = warm.lockstep("checkpoint", "verify", path, cwd=tmp_path)
        assert (ended.code, ended.out) == (78, told)
    warm.lockstep("checkpoint", "export", named, "--out", "x", cwd=tmp_path).failed_with(78, named, "no MANIFEST.json")
    (tmp_path / named).rename(tmp_path / f"{named}.corrupt")
    aside = warm.lockstep("checkpoint", "verify", f"{named}.corrupt", cwd=tmp_path)
    assert (aside.code, aside.out) == (78, told.replace(named, f"{named}.corrupt"))


def test_what_was_never_published_is_no_checkpoint(warm: WarmProcess, tmp_path: Path) -> None:
    half = ".tmp-step-00000005-0123456789ab"
    (tmp_path / "run" / "checkpoints" / half).mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    for action in (["verify", "run"], ["export", "run", "--out", "x"]):
        ended = warm.lockstep("checkpoint", *action, cwd=tmp_path)
        ended.failed_with(2, f"run: no checkpoint was saved yet (not published: {half}); train it further")
    shown = warm.lockstep("checkpoint", "list", "run", cwd=tmp_path).succeeded().out.splitlines()
    assert [line.split(maxsplit=1) for line in shown[1:]] == [[half, "not published"]]


def test_verify_and_list_need_no_torch(run: Path) -> None:
    for action in ("verify", "list"):
        code = f"import sys, launch.cli; sys.exit(launch.cli.main(['checkpoint', '{action}', 'run']) or 'torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=run.parent, check=True, capture_output=True)
