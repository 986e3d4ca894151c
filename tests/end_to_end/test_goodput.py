"""Every second of real runs is accounted for, whatever kills them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launch.clock import STEP_PHASES
from launch.goodput import account_of
from launch.history import history_of, read_attempts, read_lines
from launch.tracking.metrics_file import read_all_lines
from tests.end_to_end.runs import (
    LOCKSTEP,
    WarmProcess,
    environment,
    is_running,
    lockstep,
    newest_step,
    started,
    stop_beyond_a_checkpoint,
    wait_for_step,
    wait_until,
    workers_of,
    write_recipe,
)
from tests.end_to_end.user_models import write_user_package

# More than any attempt gets through before it is ended.
STEPS = 100_000
# The wall clock may be steered by as much of the time, and processes are known to have begun to a hundredth of a second.
STEERED, TICK = 1e-3, 0.011


def assert_nothing_is_missing(run: Path, began: float, ended: float) -> None:
    """The rows add up to the time between the first launch and the last sign of life, which lie between these moments."""
    account = account_of(run)
    attempts = read_attempts(run)
    times = [attempt.time for attempt in attempts if attempt.time is not None]
    first, last = times[0].launched, [record["clock"]["at"] for _, record in read_all_lines(run)][-1]
    last = max(last, times[-1].ended or 0.0)
    assert began - TICK <= first < last <= ended
    assert account.total == pytest.approx(last - first, rel=STEERED)
    assert account.notes == []
    assert min(seconds for attempt in account.attempts for seconds in attempt.seconds.values()) >= 0.0
    assert account.seconds["other"] <= 0.02 * account.total
    lost = history_of(attempts, read_lines(run)).superseded
    assert sum(attempt.lost_steps for attempt in account.attempts) == len(lost)


def assert_lines_agree_with_the_wall(run: Path) -> None:
    """No phase is left out at any line of any attempt, and no clock goes back."""
    launched = {attempt.attempt: attempt.time.launched for attempt in read_attempts(run) if attempt.time is not None}
    before: dict[int, float] = {}
    for _, record in read_all_lines(run):
        told = sum(record["clock"]["phases"].values())
        by_wall = record["clock"]["at"] - launched[record["attempt"]]
        assert told == pytest.approx(by_wall, rel=STEERED, abs=0.25)
        assert told >= before.get(record["attempt"], 0.0)
        before[record["attempt"]] = told


def train(recipe: Path, run: Path, world_size: int, steps: int = STEPS) -> list[object]:
    arguments = [
        "train",
        recipe,
        f"run.directory={run}",
        f"run.steps={steps}",
        "run.max_restarts=1",
        "--resume",
        "auto",
    ]
    return [LOCKSTEP, *arguments, "--workers", world_size]


def kill_everything(process: subprocess.Popen[str], workers: list[int]) -> None:
    for pid in [process.pid, *workers]:
        with contextlib.suppress(ProcessLookupError):  # the workers end with it
            os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(is_running, workers)), "the end of all workers")


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_accounts_for_every_second(recipe: Path, tmp_path: Path) -> None:
    """At three world sizes, by hand and by the supervisor, with a torn last line and an attempt without a step."""
    run, began = tmp_path / "run", time.time()
    with started(*train(recipe, run, 2), cwd=tmp_path) as process:
        kill_everything(process, stop_beyond_a_checkpoint(process, run, 1, saved=5, steps=3))
    with (run / "metrics.jsonl").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 30)
    with started(*train(recipe, run, 1), cwd=tmp_path) as process:
        (worker,) = stop_beyond_a_checkpoint(process, run, 2, saved=newest_step(run) + 1, steps=1)
        os.kill(worker, signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: len(read_attempts(run)) == 3 or process.poll() is not None, "the third attempt")
        kill_everything(process, workers_of(process.pid))
    with started(*train(recipe, run, 3), cwd=tmp_path) as process:
        wait_for_step(run, newest_step(run) + 3, 4, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    lockstep(*train(recipe, run, 2, newest_step(run) + 20)[1:], "--allow-change", cwd=tmp_path).succeeded()
    ended = time.time()

    assert_nothing_is_missing(run, began, ended)
    assert_lines_agree_with_the_wall(run)
    account = account_of(run)
    assert len(account.attempts) == 5
    # Of the first nobody was left to see its end; nor of the third.
    seen = [attempt.time is not None and attempt.time.ended is not None for attempt in read_attempts(run)]
    assert seen == [False, True, False, True, True]
    # Ended with everything saved: nothing of it was done again.
    assert account.attempts[3].lost_steps == 0
    assert account.attempts[3].seconds["lost"] == 0.0
    assert all(account.attempts[k].lost_steps > 0 and account.attempts[k].seconds["lost"] > 0.0 for k in (0, 1))
    assert all(attempt.seconds["between"] > 0.0 for attempt in account.attempts[1:])
    assert all(attempt.seconds["start"] > 0.0 for attempt in account.attempts)
    told = lockstep("goodput", run, cwd=tmp_path).succeeded().out
    assert f"goodput {account.goodput:.1%}" in told


def test_who_waits_for_another_rank_communicates(recipe_values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Rank 1 is late in every micro-batch, which rank 0 knows as nothing but a wait for it."""
    steps, late_seconds = 10, 3 * 0.05
    model = {"kind": "own_package.models_of_mine:build_late", "options": {}}
    values = recipe_values(run={"steps": steps}) | {"model": model}
    recipe = write_recipe(tmp_path / "late.yaml", values)
    path = os.pathsep.join([str(write_user_package(tmp_path / "own")), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = lockstep(
        "train", recipe, "run.directory=run", "--workers", 2, cwd=tmp_path, env=environment(PYTHONPATH=path)
    )
    told.succeeded()
    seconds = account_of(tmp_path / "run").seconds
    assert seconds["communication"] >= 0.5 * steps * late_seconds
    # In most steps: one in which rank 0 itself waited long for a core may make up for all others.
    clocks = [record["clock"] for _, record in read_all_lines(tmp_path / "run") if "digest" in record]
    waited = [after["waiting"] - before["waiting"] for before, after in pairwise(clocks)]
    within = [sum(clock["phases"][phase] for phase in STEP_PHASES) for clock in clocks]
    worked = [after - before - wait for (before, after), wait in zip(pairwise(within), waited, strict=True)]
    assert statistics.median(waited) > statistics.median(worked)


def test_one_rank_alone_waits_for_nobody(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    began = time.time()
    warm.worker(recipe, "run.steps=10", "run.directory=run", cwd=tmp_path).succeeded()
    assert_nothing_is_missing(tmp_path / "run", began, time.time())
    account = account_of(tmp_path / "run")
    assert account.seconds["communication"] == 0.0
    assert account.seconds["save"] > 0.0
    assert account.seconds["evaluate"] > 0.0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["ended"] is True
