"""The worker: `python -m launch.train RECIPE [section.key=value ...]`, alone or under torchrun, deepspeed, accelerate, srun."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence

from data.errors import CorruptData
from distrib.launchers import Launch, read_launch, refuse_meeting_alone
from distrib.phases import SAVING_THREAD
from launch.arguments import add_training_arguments, parse_with_overrides
from launch.config import RunConfig
from launch.exit_codes import DO_NOT_RESTART, FAILED, USAGE
from launch.recipe import load_recipe
from launch.refusal import directory_in, leave_refusal
from launch.run_directory import Resume, decide_resume
from launch.stopping import StopRequest
from launch.supervised import supervised_by

_THREADS_THAT_TALK = (SAVING_THREAD, "lockstep-prefetch")
"""Names of threads that exchange data with other workers, and may wait for one that is gone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one worker and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.train", allow_abbrev=False, description=__doc__)
    add_training_arguments(parser)
    arguments = parse_with_overrides(parser, argv)
    launch: Launch | None = None
    directory = directory_in(arguments.overrides)
    try:
        launch = read_launch(local_rank_argument=arguments.local_rank)
        refuse_meeting_alone(launch)
        config = load_recipe(arguments.recipe, arguments.overrides)
        directory = None  # what is refused from here on may be to take up the run that lies there
        resume = decide_resume(config, arguments.resume)
    except ValueError as error:
        if launch is None or launch.rank == 0:
            print(f"lockstep: error: {error}", file=sys.stderr)
        leave_refusal(directory, str(error))
        return DO_NOT_RESTART if isinstance(error, CorruptData) else USAGE
    return run_worker(config, resume, launch, allow_change=arguments.allow_change)


def run_worker(config: RunConfig, resume: Resume, launch: Launch, *, allow_change: bool) -> int:
    """Joins the world that the launcher described, trains, and turns whatever happens into an exit code."""
    supervised = supervised_by()
    stop = StopRequest()
    stop.listen()
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    from distrib.world import join_world, leave_world
    from launch.ending import ending_of_failure
    from launch.roll_call import call_roll
    from launch.training import run_attempt

    begun = time.monotonic()
    try:
        world = join_world(launch, config.run.device, config.parallel)
    except ValueError as error:
        print(f"lockstep: error: {error}", file=sys.stderr)
        leave_refusal(resume.directory, str(error))
        return USAGE
    except ConnectionError as error:
        print(f"lockstep: error: {error}", file=sys.stderr)
        if supervised is not None:
            supervised.say_lost(error, waited=time.monotonic() - begun >= config.parallel.timeout_seconds)
        return FAILED
    try:
        call_roll(world, launch)
        ending, _ = run_attempt(
            config, resume, allow_change=allow_change, world=world, stop=stop, supervised=supervised
        )
        if world.rank == 0 and ending.exit_code:
            print(f"lockstep: {ending.reason}", file=sys.stderr, flush=True)
        leave_world(world)
    except BaseException as error:
        ending = ending_of_failure(error)
        if not ending.expected:
            traceback.print_exc()
        elif ending.peer_lost and supervised is not None:
            supervised.say_lost(error, waited=ending.waited)  # it tells who is gone
        elif world.rank == 0 or not (ending.told_by_all or ending.peer_lost):
            print(f"lockstep: error: {ending.reason}", file=sys.stderr, flush=True)
        if ending.exit_code == USAGE:
            leave_refusal(resume.directory, ending.reason)
        if ending.told_by_all:
            leave_world(world)
        _end_without_waiting_threads(ending.exit_code)
        return ending.exit_code
    if supervised is not None:
        supervised.say_done()
    return ending.exit_code


def _end_without_waiting_threads(exit_code: int) -> None:
    """Ends the process here where a thread still waits for another worker. The interpreter's own end would pull it out of
    gloo by force, which aborts the process, and the exit code would be lost."""
    if any(thread.name in _THREADS_THAT_TALK for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


if __name__ == "__main__":
    sys.exit(main())
