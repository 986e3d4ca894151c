"""Interrupt a run at any moment, start it again, and it ends in the same bytes as the run that nothing interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import (
    LOCKSTEP,
    TIMEOUT_SECONDS,
    WarmProcess,
    checkpoints,
    digests,
    environment,
    final_bytes,
    history,
    is_running,
    lockstep,
    started,
    wait_for_step,
    wait_until,
    workers_of,
    write_corpus,
    write_recipe,
)

# More than all the attempts below get through, so that every interruption finds the run at work.
STEPS = 150
# No attempt takes more steps than these before it has been interrupted, however late that is.
MOST_STEPS = 15
# Python runs a module of this name in every process at its start.
WAITS = """
import os, time

def hear(moment):
    while moment.phase == "data" and moment.step >= int(os.environ["LAST"]) and not os.path.exists(os.environ["GO_ON"]):
        time.sleep(0.001)

if "RANK" in os.environ:
    from distrib.phases import observe
    observe(hear)
"""
# How an attempt is ended, and the exit code that `lockstep train` must then have.
INTERRUPTIONS = {
    "everything killed": -signal.SIGKILL,
    "everything killed at the start": -signal.SIGKILL,
    "supervisor killed": -signal.SIGKILL,
    "worker killed": 1,
    "SIGINT": 75,
    "SIGTERM": 75,
}


def interrupt(process: subprocess.Popen[str], how: str, choose: random.Random) -> list[int]:
    """Ends an attempt in one of the ways above; returns the ids of its workers."""
    workers = workers_of(process.pid)
    match how:
        case "everything killed" | "everything killed at the start":
            for pid in [process.pid, *workers]:
                with contextlib.suppress(ProcessLookupError):  # workers go with their supervisor
                    os.kill(pid, signal.SIGKILL)
        case "supervisor killed":
            os.kill(process.pid, signal.SIGKILL)
        case "worker killed":
            os.kill(choose.choice(workers), signal.SIGKILL)
        case "SIGINT":
            os.kill(process.pid, signal.SIGINT)
        case "SIGTERM":
            os.kill(process.pid, signal.SIGTERM)
    return workers


def train(recipe: Path, run: Path, world_size: int) -> list[object]:
    arguments = ["train", recipe, f"run.directory={run}", f"run.steps={STEPS}", "--resume", "auto"]
    return [*arguments, "--workers", world_size]


def attempt_and_interrupt(recipe: Path, run: Path, world_size: int, how: str, choose: random.Random) -> None:
    """One attempt, ended `how` at a random moment within the next few steps."""
    before = len(json.loads((run / "run.json").read_text())["attempts"]) if (run / "run.json").exists() else 0
    begun = max((int(name.removeprefix("step-")) for name in checkpoints(run)), default=0)
    site = run.parent / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(WAITS)
    go_on = run.parent / f"interrupted-{time.monotonic_ns()}"
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = environment(PYTHONPATH=path, LAST=str(begun + MOST_STEPS), GO_ON=str(go_on))
    with started(LOCKSTEP, *train(recipe, run, world_size), cwd=run.parent, env=env) as process:
        if how == "everything killed at the start":
            time.sleep(choose.uniform(0.0, 4.0))
        else:
            wait_for_step(run, begun + choose.randint(1, 7), before + 1, process)
            time.sleep(choose.uniform(0.0, 0.03))
        workers = interrupt(process, how, choose)
        go_on.touch()
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == INTERRUPTIONS[how], f"{how}: {process.returncode}\n{out}\n{err}"
        wait_until(lambda: not any(map(is_running, workers)), f"the end of all workers after: {how}")
    if how == "worker killed":
        assert "was killed by SIGKILL" in err
    if INTERRUPTIONS[how] == 75:
        outcome = json.loads((run / "outcome.json").read_text())
        assert outcome["exit_code"] == 75
        assert checkpoints(run)[-1] == f"step-{outcome['step']:08d}"


def interrupted_run(recipe: Path, run: Path, world_size: int, interruptions: list[str], seed: int) -> None:
    choose = random.Random(seed)
    for how in interruptions:
        attempt_and_interrupt(recipe, run, world_size, how, choose)
    resumed = lockstep(*train(recipe, run, world_size), cwd=run.parent).succeeded()
    assert "resumed from step" in resumed.out + resumed.err


def assert_same_run(run: Path, straight: Path) -> None:
    assert final_bytes(run) == final_bytes(straight)
    assert history(run) == history(straight)
    assert len(history(run)) == STEPS
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("world_size", "interruptions"),
    [
        pytest.param(1, ["everything killed", "SIGINT", "worker killed"], marks=pytest.mark.long),
        (2, ["worker killed", "SIGTERM", "supervisor killed", "everything killed"]),
    ],
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    world_size: int, interruptions: list[str], recipe: Path, straight_run: Callable[..., Path], tmp_path: Path
) -> None:
    interrupted_run(recipe, tmp_path / "run", world_size, interruptions, seed=world_size)
    assert_same_run(tmp_path / "run", straight_run(world_size, STEPS))


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_run_interrupted_many_times_ends_in_the_same_bytes(
    world_size: int, recipe: Path, straight_run: Callable[..., Path], tmp_path: Path
) -> None:
    choose = random.Random(f"many {world_size}")
    interruptions = [how for how in INTERRUPTIONS for _ in range(2)]
    choose.shuffle(interruptions)
    interrupted_run(recipe, tmp_path / "run", world_size, interruptions[:8], seed=world_size)
    assert_same_run(tmp_path / "run", straight_run(world_size, STEPS))


def test_a_new_run_is_told_of_a_changed_source_and_a_resumed_one_never_looks(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path, warm: WarmProcess
) -> None:
    corpus, dataset = write_corpus(tmp_path / "texts", documents=30), tmp_path / "made"
    data = {"source": f"text:{corpus}", "directory": str(dataset)}
    values = recipe_values(run={"steps": 2}, data=data, checkpoint={"every_steps": 1})
    recipe = write_recipe(tmp_path / "tiny.yaml", values)
    warning = f"warning: {dataset}: source text:{corpus} has changed since it was prepared"
    assert "warning" not in warm.worker(recipe, "run.directory=first", cwd=tmp_path).succeeded().out
    (corpus / "document-00.txt").write_text("something else")
    begun = lockstep("train", recipe, "run.directory=second", "--workers", 1, cwd=tmp_path).succeeded()
    assert begun.out.count(warning) == 1
    assert warm.worker(recipe, "run.directory=third", cwd=tmp_path).succeeded().out.count(warning) == 1
    assert digests(tmp_path / "third") == digests(tmp_path / "first")
    resumed = warm.worker(
        recipe, "run.directory=first", "run.steps=3", "--allow-change", "--resume", "auto", cwd=tmp_path
    )
    assert warning not in resumed.succeeded().out
    shutil.rmtree(corpus)
    assert warning not in warm.worker(recipe, "run.directory=fourth", cwd=tmp_path).succeeded().out
