"""`lockstep train --debug` and `--fake-world N`, from their arguments on. A wrong one is answered without torch."""

from __future__ import annotations

import argparse

from distrib.capabilities import refuse_fake_world
from launch.debug_recipe import debug_recipe, given_keys
from launch.recipe import load_recipe
from launch.run_directory import decide_resume


def debug(arguments: argparse.Namespace) -> int:
    """Runs what `--debug` asks for and returns the exit code. Raises ValueError, in one line, for what does not go together."""
    if arguments.workers is not None:
        raise ValueError(f"--workers {arguments.workers}: has no effect with --debug (one process); remove it")
    if arguments.fake_world is not None:
        return _fake_world(arguments)
    _refuse_fake_rank(arguments)
    recipe = debug_recipe(arguments.recipe, arguments.overrides, resumed=arguments.resume is not None)
    resume = decide_resume(recipe.config, arguments.resume)
    from launch.debug_run import run_debug

    return run_debug(recipe, resume, allow_change=arguments.allow_change)


def refuse_alone(arguments: argparse.Namespace) -> None:
    """ValueError for options that only `--debug` knows."""
    if arguments.fake_world is not None:
        raise ValueError(f"--fake-world {arguments.fake_world}: needs --debug; add it")
    _refuse_fake_rank(arguments)


def _refuse_fake_rank(arguments: argparse.Namespace) -> None:
    if arguments.fake_rank is not None:
        raise ValueError(f"--fake-rank {arguments.fake_rank}: needs --debug --fake-world N; add them")


def _fake_world(arguments: argparse.Namespace) -> int:
    size, rank = arguments.fake_world, arguments.fake_rank or 0
    if size < 2:
        raise ValueError(f"--fake-world {size}: must be at least 2")
    if not 0 <= rank < size:
        raise ValueError(f"--fake-rank {rank}: must be one of the ranks of --fake-world {size}, 0 to {size - 1}")
    if arguments.resume is not None:
        raise ValueError(f"--resume {arguments.resume}: has no effect with --fake-world; remove it")
    config = load_recipe(arguments.recipe, arguments.overrides)
    refuse_fake_world(config.parallel)
    steps = config.run.steps if "run.steps" in given_keys(arguments.overrides) else None
    from launch.fake_world import run_in_fake_world

    return run_in_fake_world(config, size=size, rank=rank, steps=steps)
