"""A run whose gradients are no longer finite: steps are skipped, and after enough of them in a row the run ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import open_dataset
from data.order import GlobalOrder
from data.store import LocalStore
from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import LOCKSTEP, command, environment, write_recipe
from tests.end_to_end.user_models import write_user_package


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_skipping_for_ever_ends_the_run_with_the_step_and_its_samples(
    recipe_values: Callable[..., dict[str, Any]], dataset: Path, tmp_path: Path, workers: int
) -> None:
    values = recipe_values(batch={"micro_samples": 12 // workers}, health={"max_skipped_in_a_row": 3})
    values["model"] = {"kind": "own_package.models_of_mine:build_poisoned"}
    recipe = write_recipe(tmp_path / "poisoned.yaml", values)
    env = environment(PYTHONPATH=str(write_user_package(tmp_path / "mine")))
    ended = command(LOCKSTEP, "train", recipe, "run.directory=run", "--workers", workers, cwd=tmp_path, env=env)

    steps = read_metrics(tmp_path / "run")[0]
    skipped = [record["step"] for record in steps if record["skipped"]]
    assert skipped == [len(steps) - 2, len(steps) - 1, len(steps)]
    assert steps[-1]["samples"] == 12 * len(steps)
    assert ended.code == 78
    samples = open_dataset(LocalStore(dataset), DataConfig(**values["data"]), "train").samples
    ids = GlobalOrder(samples, 0).sample_ids(np.arange(12 * (len(steps) - 1), 12 * len(steps)))[1].tolist()
    shown = ", ".join(map(str, ids[:8]))
    for text in (
        f"step {len(steps)}: the gradient was not finite in 3 steps in a row",
        f"weights are those of step {len(steps) - 3}",
        f"the samples of step {len(steps)} are {shown} and 4 more",
    ):
        assert text in ended.err
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (78, len(steps))
    assert ", ".join(map(str, ids)) in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
