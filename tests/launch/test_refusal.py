"""A worker that is refused before its run began tells so in outcome.json, and alters nothing that another one has told."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from launch.refusal import leave_refusal
from launch.train import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a job that is beginning."""
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    return tmp_path / "run"


def test_a_wrong_recipe_is_told_where_a_job_has_made_the_directory(run: Path, tmp_path: Path) -> None:
    for directory in (run, tmp_path / "nowhere", tmp_path):
        assert main(["lenet-digits", "optimizer.speed=1", f"run.directory={directory}"]) == 2
    told = json.loads((run / "outcome.json").read_text())
    assert told["exit_code"] == 2
    assert "optimizer.speed" in told["reason"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_run_has_told_stays(run: Path) -> None:
    (run / "outcome.json").write_text("done")
    leave_refusal(run, "no")
    assert (run / "outcome.json").read_text() == "done"


def test_a_run_that_goes_on_is_left_alone(run: Path) -> None:
    with (run / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        leave_refusal(run, "no")
    assert not (run / "outcome.json").exists()


def test_a_run_that_was_killed_is_not_refused_by_who_starts_another_one_there(run: Path) -> None:
    (run / "run.json").write_text('{"attempts": [{}]}')
    assert main(["lenet-digits", f"run.directory={run}"]) == 2
    assert not (run / "outcome.json").exists()
