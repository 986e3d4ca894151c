"""Requests to stop, and what is left of a run whose processes were killed."""

from __future__ import annotations

import fcntl
import json
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
    command,
    environment,
    is_running,
    started,
    wait_for_step,
    wait_until,
    workers_of,
    write_recipe,
)
from tests.end_to_end.user_models import write_user_package

ENDLESS = ["run.directory=run", "run.steps=1000000"]


def assert_stopped_with_everything_saved(code: int, err: str, run: Path) -> None:
    outcome = json.loads((run / "outcome.json").read_text())
    assert code == 75, err
    assert outcome["exit_code"] == 75
    assert checkpoints(run)[-1] == f"step-{outcome['step']:08d}"
    [line] = [line for line in err.splitlines() if line.startswith("lockstep: ")]
    assert line == f"lockstep: stopped on request after step {outcome['step']} of 1000000; everything is saved"


def test_the_stop_file_ends_a_run(recipe: Path, tmp_path: Path) -> None:
    with started(LOCKSTEP, "train", recipe, *ENDLESS, "--workers", 2, cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 3, None, process)
        (tmp_path / "run" / "stop").touch()
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert_stopped_with_everything_saved(process.returncode, err, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_that_comes_before_the_workers_listen_is_heard(
    number: signal.Signals, recipe: Path, tmp_path: Path
) -> None:
    with started(LOCKSTEP, "train", recipe, *ENDLESS, "--workers", 2, cwd=tmp_path) as process:
        wait_until(lambda: len(workers_of(process.pid)) == 2, "both workers")
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert_stopped_with_everything_saved(process.returncode, err, tmp_path / "run")


def test_a_request_while_preparing_data_ends_with_75(recipe: Path, tmp_path: Path) -> None:
    _ask_while_preparing(signal.SIGTERM, recipe, tmp_path)


def _ask_while_preparing(number: signal.Signals, recipe: Path, tmp_path: Path) -> None:
    """It waits for another process that prepares the same dataset."""
    lock = tmp_path / ".made.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        arguments = ["train", recipe, f"data.directory={tmp_path / 'made'}"]
        with started(LOCKSTEP, *arguments, *ENDLESS, cwd=tmp_path) as process:
            wait_until(lambda: _waits_for_lock(process.pid), "waiting for the other preparation")
            process.send_signal(number)
            _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75
    assert err.splitlines()[-1] == "lockstep: interrupted; what was finished is intact"
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "run").exists()


def _is_held_back(pid: int) -> bool:
    """Whether our first line has run: until then a signal finds only the interpreter, which dies of it."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    caught = int(status["SigBlk"], 16) | int(status["SigCgt"], 16)
    return bool(caught & 1 << (signal.SIGUSR1 - 1))


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_request_that_comes_before_anything_is_there_ends_with_75(
    number: signal.Signals, recipe: Path, tmp_path: Path
) -> None:
    """As early as it can be heard, and then later and later, until the workers have been started for some time."""
    for place, delay in enumerate((0.0, 0.1, 0.5, 1.5)):
        run = tmp_path / f"run-{place}"
        arguments = ["train", recipe, f"run.directory={run}", "run.steps=1000000", "--workers", 2]
        with started(LOCKSTEP, *arguments, cwd=tmp_path) as process:
            wait_until(lambda: _is_held_back(process.pid), "the first line of ours")
            time.sleep(delay)
            process.send_signal(number)
            _, err = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 75, (delay, err)
        assert "Traceback" not in err, (delay, err)
        if run.exists():
            assert_stopped_with_everything_saved(process.returncode, err, run)
        else:
            assert err == "lockstep: interrupted; what was finished is intact\n"


# Python runs a module of this name in every process at its start: what the command imports waits for the request.
IMPORTS_LATE = """
import signal, sys, time

class Waits:
    def find_spec(self, name, *_):
        while name == "launch.commands" and signal.SIGINT not in signal.sigpending():
            time.sleep(0.01)

sys.meta_path.insert(0, Waits())
"""


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_ctrl_c_while_a_command_is_imported_is_a_line(command: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(IMPORTS_LATE)
    with started(LOCKSTEP, command, "run", cwd=tmp_path, env=environment(PYTHONPATH=str(site))) as process:
        wait_until(lambda: _is_held_back(process.pid), "the first line of ours")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert (process.returncode, err) == (75, "lockstep: interrupted; what was finished is intact\n")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_any_request_while_preparing_data_ends_with_75(number: signal.Signals, recipe: Path, tmp_path: Path) -> None:
    _ask_while_preparing(number, recipe, tmp_path)


def _waits_for_lock(pid: int) -> bool:
    return f" {pid} " in "".join(line for line in Path("/proc/locks").read_text().splitlines() if "->" in line)


def test_a_second_interrupt_ends_at_once_and_leaves_nobody(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A step of this model takes a minute: the first Ctrl-C waits for it, the second does not. Two that come before the first
    was heard are one."""
    values = recipe_values()
    values["model"] = {"kind": "own_package.models_of_mine:build_slow"}
    recipe = write_recipe(tmp_path / "slow.yaml", values)
    env = environment(PYTHONPATH=str(write_user_package(tmp_path / "mine")))
    with started(LOCKSTEP, "train", recipe, *ENDLESS, "--workers", 2, cwd=tmp_path, env=env) as process:
        wait_until((tmp_path / "slow-0").exists, "a step")
        workers = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        wait_until((tmp_path / "asked-0").exists, "word of the first Ctrl-C at a worker")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 1
        wait_until(lambda: not any(map(is_running, workers)), "the end of all workers")


def test_leftovers_of_killed_saves_are_cleared(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "run" / "checkpoints" / ".tmp-step-00000005-0123456789ab"
    leftover.mkdir(parents=True)
    (leftover / "model-00001.safetensors").write_bytes(b"half")
    warm.worker(recipe, "run.directory=run", "run.steps=1", cwd=tmp_path).succeeded()
    assert not leftover.exists()


def test_a_worker_that_breaks_shows_its_traceback_and_takes_the_others_along(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    values = recipe_values()
    values["model"] = {"kind": "own_package.models_of_mine:build_broken"}
    recipe = write_recipe(tmp_path / "broken.yaml", values)
    env = environment(PYTHONPATH=str(write_user_package(tmp_path / "mine")))
    ended = command(LOCKSTEP, "train", recipe, "run.directory=run", "--workers", 2, cwd=tmp_path, env=env)
    assert ended.code == 1
    assert "AttributeError: 'Tensor' object has no attribute 'no_such_thing'" in ended.err
    assert 'models_of_mine.py", line' in ended.err
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit_code"] == 1
    assert "no_such_thing" in outcome["reason"]
