"""`lockstep train --debug`: the worker without anything around it, in the process that was started and on its terminal."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from distrib.finite_watch import FiniteWatch
from distrib.launchers import Launch
from distrib.manifest import published_checkpoints
from distrib.world import leave_world, single_process_world
from launch.debug import Debug
from launch.debug_recipe import DebugRecipe
from launch.ending import Ending, ending_of_failure
from launch.roll_call import call_roll
from launch.run_directory import Resume
from launch.stopping import StopRequest
from launch.training import run_attempt


def run_debug(recipe: DebugRecipe, resume: Resume, *, allow_change: bool) -> int:
    """Takes a few steps and returns the exit code. The run's directory is a temporary one, which is removed, unless a new
    one was asked for; a run that is resumed is read and left as it is."""
    # Ctrl-C ends it at once, wherever it stands: there is nobody to agree with and nothing to save.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resume, kept = _apart(resume)
    if kept:
        return _run(recipe, resume, kept=True, allow_change=allow_change)
    with tempfile.TemporaryDirectory(prefix="lockstep-debug-") as directory:
        temporary = replace(resume, directory=Path(directory))
        return _run(recipe, temporary, kept=False, allow_change=allow_change)


def _apart(resume: Resume) -> tuple[Resume, bool]:
    """Where to start from, and whether `resume.directory` is a new one that stays. An earlier run is only read."""
    directory = resume.directory
    if directory is None or not (directory / "run.json").exists():
        return replace(resume, from_newest=False), directory is not None
    if resume.checkpoint is not None:
        return Resume(None, checkpoint=resume.checkpoint), False
    published = published_checkpoints(directory / "checkpoints")
    if not published:
        raise ValueError(f"--resume: {directory} has no checkpoint yet; debug it without --resume")
    return Resume(None, checkpoint=published[0]), False


def _run(recipe: DebugRecipe, resume: Resume, *, kept: bool, allow_change: bool) -> int:
    config = recipe.config
    _tell_beforehand(recipe, resume, kept=kept)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    world = single_process_world(config.run.device)
    watch = FiniteWatch(tell_gradients=_tell if config.parallel.precision == "fp16" else None)
    debug = Debug(recipe.steps, kept, watch)
    try:
        # Without torch's own check for NaN, which tells a page and neither infinities nor the parameter: the watch looks.
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            call_roll(world, Launch("lockstep train --debug"))
            ending, _ = run_attempt(
                config, resume, allow_change=allow_change, world=world, stop=StopRequest(), debug=debug
            )
    except BaseException as error:
        ending = ending_of_failure(error)
        if not ending.expected:
            traceback.print_exc()
    _tell_end(ending)
    leave_world(world)
    return ending.exit_code


def _tell_beforehand(recipe: DebugRecipe, resume: Resume, *, kept: bool) -> None:
    steps = recipe.config.run.steps if recipe.steps is None else min(recipe.steps, recipe.config.run.steps)
    start = f" after {resume.checkpoint}" if resume.checkpoint else ""
    _tell(f"debug: {steps} steps{start} in this process, with anomaly detection; key=value on the command line wins")
    for change in recipe.changes:
        _tell(f"  {change}")
    if not kept:
        _tell("nothing is kept: the run's directory is a temporary one; run.directory=NEW keeps it")


def _tell_end(ending: Ending) -> None:
    if ending.exit_code and ending.expected:
        _tell(f"lockstep: error: {ending.reason}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
