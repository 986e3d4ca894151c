"""The run's directory: numbered, claimed by one process, never mixed with another run's."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data.errors import CorruptData
from launch.config import RunConfig
from launch.ending import Ending, write_outcome
from launch.recipe import load_recipe
from launch.run_directory import (
    Resume,
    RunDirectory,
    begin_attempt,
    claim,
    decide_resume,
    describe_environment,
    ever_checkpointed,
    put_end_on_record,
)


def recipe(*overrides: str) -> RunConfig:
    return load_recipe("gpt-stdlib", overrides)


def begun(path: Path) -> Path:
    """A run directory as its first attempt leaves it."""
    run = claim(recipe(), Resume(path))
    begin_attempt(run, world_size=1)
    run.close()
    return path


def checkpoint_of(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "MANIFEST.json").write_text("{}")
    return path


def test_runs_are_numbered_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "gpt-stdlib-0007").mkdir(parents=True)
    (tmp_path / "runs" / "gpt-stdlib-notes").mkdir()
    names = []
    for _ in range(2):
        run = claim(recipe(), decide_resume(recipe(), None))
        names.append(run.path.name)
        run.close()
    assert names == ["gpt-stdlib-0008", "gpt-stdlib-0009"]


def test_a_directory_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(ValueError, match=r"already holds a run; continue it with --resume auto"):
        decide_resume(recipe(f"run.directory={run}"), None)
    assert decide_resume(recipe(f"run.directory={run}"), "auto") == Resume(run, from_newest=True)
    assert decide_resume(recipe(), str(run)) == Resume(run, from_newest=True)


def test_a_directory_without_a_run_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    config = recipe(f"run.directory={tmp_path}")
    assert decide_resume(config, None) == Resume(tmp_path)
    claim(config, Resume(tmp_path)).close()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_named_checkpoint_continues_its_own_run_or_begins_a_new_one(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    other = begun(tmp_path / "other")
    path = checkpoint_of(run, 5)
    assert decide_resume(recipe(), str(path)) == Resume(run, checkpoint=path)
    new = tmp_path / "new"
    assert decide_resume(recipe(f"run.directory={new}"), str(path)) == Resume(new, checkpoint=path)
    with pytest.raises(ValueError, match=r"holds another run; name another directory"):
        decide_resume(recipe(f"run.directory={other}"), str(path))


def test_two_runs_cannot_be_named_at_once(tmp_path: Path) -> None:
    one, other = begun(tmp_path / "one"), begun(tmp_path / "other")
    with pytest.raises(ValueError, match=r"name two runs"):
        decide_resume(recipe(f"run.directory={one}"), str(other))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = claim(recipe(), Resume(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"another process is training in it"):
        claim(recipe(), Resume(tmp_path / "run"))
    run.close()
    claim(recipe(), Resume(tmp_path / "run")).close()


def test_a_claim_waits_for_one_that_is_ending(tmp_path: Path) -> None:
    """A process that was killed is gone for its parent before its last thread has let go of the lock."""
    run = claim(recipe(), Resume(tmp_path / "run"))
    ending = threading.Timer(0.2, run.close)
    ending.start()
    claim(recipe(), Resume(tmp_path / "run")).close()
    ending.join()


def test_a_claim_waits_as_long_where_the_machine_stood_still_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = claim(recipe(), Resume(tmp_path / "run"))
    ending = threading.Timer(0.2, run.close)
    ending.start()
    hours = itertools.count(0.0, 3600.0)
    monkeypatch.setattr("time.monotonic", lambda: next(hours))
    claim(recipe(), Resume(tmp_path / "run")).close()
    ending.join()


def test_the_claim_ends_with_its_process(tmp_path: Path) -> None:
    """However it ends: a run whose machine lost power must not need a lock removed by hand."""
    code = (
        "import os, signal, sys; from pathlib import Path; from launch.recipe import load_recipe;"
        "from launch.run_directory import Resume, claim;"
        "run = claim(load_recipe('gpt-stdlib'), Resume(Path(sys.argv[1]))); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False, timeout=120)
    assert done.returncode == -9
    claim(recipe(), Resume(tmp_path / "run")).close()


def test_the_identity_lasts_over_attempts(tmp_path: Path) -> None:
    identities = []
    for attempt in (1, 2):
        run = claim(recipe(), Resume(tmp_path / "run"))
        begin_attempt(run, world_size=attempt)
        assert run.attempt == attempt
        run.close()
        identities.append(json.loads((tmp_path / "run" / "run.json").read_text()))
    first, second = identities
    assert first["run_id"] == second["run_id"]
    assert first["wandb_run_id"] == second["wandb_run_id"]
    assert [(a["attempt"], a["world_size"]) for a in second["attempts"]] == [(1, 1), (2, 2)]


def test_a_claim_clears_what_a_killed_attempt_left(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    (run / "stop").touch()
    (run / ".tmp-run.json-0123456789ab").write_text('{"half')
    claim(recipe(), Resume(run)).close()
    assert not (run / "stop").exists()
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize("damaged", ["{torn", "", "[]", "{}", '{"attempts": {}}', '{"attempts": [1]}'])
def test_a_damaged_identity_is_named_and_left_as_it_is(damaged: str, tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    (run / "run.json").write_text(damaged)
    for read in (lambda: claim(recipe(), Resume(run)), lambda: put_end_on_record(run, 1, 0.0)):
        for _ in range(2):  # the claim was given up again
            with pytest.raises(CorruptData, match=r"run/run.json: not what a run writes; restore the file"):
                read()
    assert (run / "run.json").read_text() == damaged


def test_an_older_outcome_does_not_speak_for_a_new_attempt(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    (run / "outcome.json").write_text('{"exit_code": 75, "attempt": 1}')
    begun(run)
    assert not (run / "outcome.json").exists()


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_an_unwritable_place_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ValueError, match=r"cannot be written \(.*\); set run.directory") as refused:
        claim(recipe(), Resume(tmp_path / place))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [([], False), (["step-00000005"], True), (["step-00000005.corrupt"], True), ([".tmp-step-00000005-a"], False)],
)
def test_ever_checkpointed(names: list[str], expected: bool, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert ever_checkpointed(tmp_path) is expected


def test_the_environment_holds_no_variable_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-0123456789")
    monkeypatch.setenv("SOME_TOKEN", "secret-0123456789")
    text = json.dumps(describe_environment(["cpu"], 1))
    assert "secret" not in text
    assert '"torch"' in text


def test_an_outcome_that_cannot_be_written_is_told_and_hides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path / "gone", {"attempts": []})
    write_outcome(run, Ending(78, "the disk is full"), rank=0, step=1, seconds=1.0)
    assert "outcome.json: cannot be written (No such file or directory)" in capsys.readouterr().err
