"""Whole runs that save beside training: the same checkpoints as runs that wait, the wait on record, no half save at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrib.checkpoint import open_checkpoint
from distrib.world import single_process_world
from launch.tracking.metrics_file import read_checkpoint_stalls, read_metrics
from tests.end_to_end.runs import (
    WarmProcess,
    checkpoints,
    digests,
    environment,
    final_bytes,
    history,
    lockstep,
    write_recipe,
)
from tests.end_to_end.user_models import write_user_package

WORLD = single_process_world("cpu")


def test_a_run_that_waits_for_its_checkpoints_saves_the_same(
    warm: WarmProcess, recipe: Path, straight_run: Callable[..., Path], tmp_path: Path
) -> None:
    beside = straight_run(1)
    ended = warm.worker(recipe, "run.directory=waits", "checkpoint.asynchronous=false", cwd=tmp_path).succeeded()
    waits = tmp_path / "waits"
    assert final_bytes(waits) == final_bytes(beside)
    assert history(waits) == history(beside)
    states = [run / "checkpoints" / checkpoints(run)[-1] / "state.json" for run in (beside, waits)]
    assert states[0].read_bytes() == states[1].read_bytes()

    for run in (beside, waits):
        stalls = read_checkpoint_stalls(run)
        assert [stall["step"] for stall in stalls] == list(range(5, 41, 5))
        assert all(set(stall) == {"step", "attempt", "checkpoint_stall_seconds", "clock"} for stall in stalls)
        assert all(0 < stall["checkpoint_stall_seconds"] < 60 for stall in stalls)
        log = (run / "logs" / "rank-0.log").read_text()
        assert log.count("checkpoint of step 40: training waited ") == 1
        assert log.count("checkpoint of step 40: saved in ") == 1
    total = sum(stall["checkpoint_stall_seconds"] for stall in read_checkpoint_stalls(waits))
    assert f"training waited {total:.3g} s for 8 checkpoints" in ended.err


def test_waits_for_checkpoints_are_tracked_and_reported(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked = ["tracking.tensorboard=true", "tracking.every_steps=100"]
    warm.worker(recipe, "run.directory=run", "run.steps=7", *tracked, cwd=tmp_path).succeeded()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("checkpoint_stall_seconds")] == [5, 7]
    warm.lockstep("report", "run", cwd=tmp_path).succeeded()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Waited for checkpoints" in page
    assert "2 saves, " in page
    assert "Wait for a checkpoint, seconds" in page


@pytest.fixture
def large_recipe(recipe_values: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    values = recipe_values(run={"steps": 400})
    values["model"] = {"kind": "own_package.models_of_mine:build_ends_during_save"}
    return write_recipe(tmp_path / "large.yaml", values)


def assert_only_whole_checkpoints(run: Path) -> None:
    for name in checkpoints(run):
        open_checkpoint(run / "checkpoints" / name, WORLD)


@pytest.mark.parametrize(("how", "code"), [("mistake", 1), ("interrupt", 1), ("kill", -9)])
def test_a_run_that_ends_during_a_save_goes_on_from_a_whole_checkpoint(
    warm: WarmProcess, large_recipe: Path, tmp_path: Path, how: str, code: int
) -> None:
    package = str(write_user_package(tmp_path / "mine"))
    arguments = [large_recipe, "run.directory=run", "--resume", "auto"]
    env = environment(PYTHONPATH=package, BREAK=how)
    ended = warm.worker(*arguments, cwd=tmp_path, env=env)
    run = tmp_path / "run"
    assert ended.code == code, ended.err
    saved = checkpoints(run)
    assert saved[0] == "step-00000005"
    assert_only_whole_checkpoints(run)
    if how == "mistake":  # what needed only time was given it
        assert "ArithmeticError: a mistake during the save" in ended.err
        assert saved == ["step-00000005", "step-00000010"]
    if how != "kill":
        assert json.loads((run / "outcome.json").read_text())["exit_code"] == 1
    arguments += ["run.steps=14", "--allow-change"]
    resumed = warm.worker(*arguments, cwd=tmp_path, env=environment(PYTHONPATH=package)).succeeded()
    assert f"resumed from step {int(saved[-1][5:])}" in resumed.err
    assert checkpoints(run)[-1] == "step-00000014"
    assert [record["step"] for record in read_metrics(run)[0]][:14] == list(range(1, 15))
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.long
@pytest.mark.parametrize(("how", "code"), [("mistake", 1), ("kill", 1)])
def test_workers_end_when_one_of_them_ends_during_a_save(
    large_recipe: Path, tmp_path: Path, how: str, code: int
) -> None:
    package = str(write_user_package(tmp_path / "mine"))
    arguments = ["train", large_recipe, "run.directory=run", "--resume", "auto", "--workers", 2]
    env = environment(PYTHONPATH=package, BREAK=how, BREAK_RANK="1")
    ended = lockstep(*arguments, cwd=tmp_path, env=env)
    run = tmp_path / "run"
    assert ended.code == code, ended.err
    assert "killed by SIGABRT" not in ended.err
    assert_only_whole_checkpoints(run)
    if how == "mistake":
        assert "a mistake during the save" in json.loads((run / "outcome.json").read_text())["reason"]
        assert checkpoints(run) == ["step-00000005", "step-00000010"]
    arguments += ["run.steps=14", "--allow-change"]
    lockstep(*arguments, cwd=tmp_path, env=environment(PYTHONPATH=package)).succeeded()
    assert checkpoints(run)[-1] == "step-00000014"
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.long
def test_sharded_workers_that_wait_save_the_same(recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", recipe, "parallel.zero_stage=3", "run.steps=12", "--workers", 2]
    for name, asynchronous in (("beside", "true"), ("waits", "false")):
        asked = [f"run.directory={name}", f"checkpoint.asynchronous={asynchronous}"]
        lockstep(*arguments, *asked, cwd=tmp_path).succeeded()
    assert final_bytes(tmp_path / "beside") == final_bytes(tmp_path / "waits")
    assert digests(tmp_path / "beside") == digests(tmp_path / "waits")
