"""One run, whoever starts it: the same losses and the same digests under every launcher and at every world size."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import LOCKSTEP, command, digests, environment, losses, write_recipe

STEPS = 8
LAUNCHERS: dict[str, tuple[list[object], list[object], int]] = {
    "one worker": ([LOCKSTEP, "train"], ["--workers", 1], STEPS),
    "three workers": ([LOCKSTEP, "train"], ["--workers", 3], STEPS),
    "python -m": ([sys.executable, "-m", "launch.train"], [], STEPS),
    "torchrun": (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "launch.train"],
        [],
        STEPS,
    ),
    "debug": ([LOCKSTEP, "train"], ["--debug"], 5),
}


@pytest.fixture(scope="module")
def recipe_without_chance(
    recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Dropout depends on how a batch is cut, and a falling rate on the number of steps: neither is here."""
    values = recipe_values(run={"steps": STEPS}, model={"dropout": 0.0}, schedule={"kind": "constant"})
    return write_recipe(tmp_path_factory.mktemp("launchers") / "recipe.yaml", values)


@pytest.fixture(scope="module")
def reference(recipe_without_chance: Path) -> Path:
    return launch("one worker", recipe_without_chance)


def launch(launcher: str, recipe: Path) -> Path:
    before, after, _ = LAUNCHERS[launcher]
    run = recipe.parent / launcher.replace(" ", "-")
    command(*before, recipe, f"run.directory={run}", *after, cwd=recipe.parent).succeeded()
    return run


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "one worker"])
def test_every_launcher_gives_the_same_run(launcher: str, recipe_without_chance: Path, reference: Path) -> None:
    run = launch(launcher, recipe_without_chance)
    steps = LAUNCHERS[launcher][2]
    assert digests(run) == digests(reference)[:steps]
    assert losses(run) == pytest.approx(losses(reference)[:steps], rel=1e-6)
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 0


def test_the_comparison_can_fail(recipe_without_chance: Path, reference: Path) -> None:
    """Another seed is another order and other weights."""
    run = recipe_without_chance.parent / "other-seed"
    worker = [sys.executable, "-m", "launch.train", recipe_without_chance, f"run.directory={run}", "run.seed=1"]
    command(*worker, cwd=run.parent).succeeded()
    assert not set(digests(run)) & set(digests(reference))
    assert losses(run) != pytest.approx(losses(reference), rel=1e-3)


def test_torchrun_makes_any_failure_1_but_outcome_json_keeps_the_truth(
    recipe_without_chance: Path, tmp_path: Path
) -> None:
    torchrun = LAUNCHERS["torchrun"][0]
    ended = command(
        *torchrun, recipe_without_chance, "run.directory=run", "model.vocabulary_size=100", cwd=tmp_path,
        env=environment(),
    )  # fmt: skip
    assert ended.code == 1
    assert len(ended.told) == 1
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit_code"] == 2
    assert "model.vocabulary_size 100" in outcome["reason"]
