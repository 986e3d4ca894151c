"""What a recipe becomes under `lockstep train --debug`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.config import RunConfig
from launch.recipe import load_recipe
from launch.resume import changed_keys

_STEPS = 5
_GENERATED_TOKENS = 16


@dataclass(frozen=True)
class DebugRecipe:
    """A recipe for one process and a few steps, where every key that was given on the command line is as it was given."""

    config: RunConfig
    steps: int | None
    """How many steps to take; None: as many as the recipe has."""
    changes: tuple[str, ...]
    """How it differs from the recipe, as `key: before -> now`."""


def debug_recipe(recipe: str, overrides: Sequence[str], *, resumed: bool) -> DebugRecipe:
    """The recipe's own first steps, or those after a checkpoint (`resumed`), on a slice of the data that is as small as it can
    be. Raises ValueError as `load_recipe` does."""
    given = given_keys(overrides)
    asked = load_recipe(recipe, overrides)
    defaults = {key: value for key, value in _defaults(asked, resumed=resumed).items() if key not in given}
    config = load_recipe(recipe, [*overrides, *(f"{key}={value}" for key, value in defaults.items())])
    changes = tuple(f"{key}: {before} -> {after}" for key, (before, after) in changed_keys(asked, config).items())
    return DebugRecipe(config, None if "run.steps" in given else _STEPS, changes)


def given_keys(overrides: Sequence[str]) -> set[str]:
    """The dotted keys that overrides set."""
    return {override.partition("=")[0] for override in overrides}


def _defaults(config: RunConfig, *, resumed: bool) -> dict[str, object]:
    """Key -> value, as it is written in an override. The learning rates stay the run's own: its length is not touched."""
    micro_samples = config.batch.micro_samples
    defaults: dict[str, object] = {
        "checkpoint.every_steps": "null",
        "evaluation.every_steps": "null",
        "evaluation.samples": min(micro_samples, config.evaluation.samples or micro_samples),
        "evaluation.generated_tokens": min(_GENERATED_TOKENS, config.evaluation.generated_tokens),
        "tracking.wandb": "off",
        "tracking.tensorboard": "false",
        # A bar would draw over a debugger's prompt; every step gets its line.
        "tracking.progress": "lines",
        "tracking.progress_seconds": 1e-6,
        "parallel.compile": "false",
        "parallel.replicas": "null",
    }
    if config.data.workers:
        defaults["data.workers"] = 0
    # Two micro-batches, so that gradients still add up. A resumed run goes on with the very samples that are to be
    # looked into, and a DeepSpeed file may name the batch.
    if not resumed and config.parallel.deepspeed_config is None:
        smallest = max(2 * micro_samples, config.data.streaming_parts or 1)
        defaults["batch.global_samples"] = min(config.batch.global_samples, smallest)
    return defaults
