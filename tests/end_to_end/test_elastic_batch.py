"""A run that loses a worker goes on with those that are left: the same samples, the same gradient, whatever divides what."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import (
    LOCKSTEP,
    WarmProcess,
    digests,
    lockstep,
    losses,
    newest_step,
    started,
    wait_until,
    workers_of,
    write_recipe,
)

# More than the run gets through before its worker is lost.
STEPS = 100_000
# What four workers run, and what the three that are left go on with.
LAYOUTS: dict[str, tuple[list[str], list[str]]] = {
    "replicated": ([], []),
    "ZeRO stage 3": (["parallel.zero_stage=3"], ["parallel.zero_stage=3"]),
    "accelerate, then ZeRO stage 3": (
        ["parallel.engine=accelerate"],
        ["parallel.engine=native", "parallel.zero_stage=3"],
    ),
}


@pytest.fixture(scope="module")
def ragged_recipe(recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of 3, 3, 3 and 4 samples on four ranks, of 4, 4 and 5 on three, in micro-batches of 2: no part is like another.
    Dropout, which depends on how a batch is cut, is off, and the rate does not depend on how many steps there are to be."""
    values = recipe_values(
        run={"steps": STEPS},
        model={"dropout": 0.0},
        batch={"global_samples": 13},
        schedule={"kind": "constant"},
        checkpoint={"every_steps": 4},
    )
    return write_recipe(tmp_path_factory.mktemp("elastic") / "ragged.yaml", values)


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_of_four_workers_go_on_with_the_same_run(
    layout: str, ragged_recipe: Path, tmp_path: Path, warm: WarmProcess
) -> None:
    run, (four, three) = tmp_path / "run", LAYOUTS[layout]
    arguments: list[object] = ["train", ragged_recipe, f"run.directory={run}"]
    with started(LOCKSTEP, *arguments, *four, "--workers", 4, cwd=tmp_path) as process:
        wait_until(lambda: process.poll() is not None or newest_step(run) >= 8, f"the second checkpoint of {run}")
        os.kill(workers_of(process.pid)[3], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1, err
    steps = newest_step(run) + 24
    again = [*three, f"run.steps={steps}", "--resume", "auto", "--allow-change", "--workers", 3]
    lockstep(*arguments, *again, cwd=tmp_path).succeeded()
    # One worker, never interrupted.
    straight = tmp_path / "straight"
    warm.worker(ragged_recipe, f"run.directory={straight}", f"run.steps={steps}", cwd=tmp_path).succeeded()
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert [attempt["world_size"] for attempt in attempts] == [4, 3]
    assert 8 <= attempts[1]["resumed_from_step"] < steps
    assert len(digests(run)) == steps
    assert digests(run) == digests(straight)
    assert losses(run) == pytest.approx(losses(straight), rel=2e-6)
