"""What a run notices about itself while it trains, and what it does then, by the policy of its recipe."""

from __future__ import annotations

import json
import os
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
from tests.end_to_end.runs import (
    LOCKSTEP,
    Result,
    WarmProcess,
    checkpoints,
    command,
    environment,
    final_bytes,
    history,
    write_recipe,
)
from tests.end_to_end.user_models import write_user_package

Train = Callable[..., Result]

# Python runs a module of this name in every process at its start: reading what a step needs takes some ranks far longer.
SLOW_SOURCE = """
import os, sys

if os.environ.get("RANK", "") in {ranks!r} and "launch.train" in sys.orig_argv:
    import time
    from data.reading import Reader

    read = Reader.read

    def slowly(self, block, start, stop):
        time.sleep(0.2 * (stop - start) + {pause_seconds} * (start == 7 and os.environ["RANK"] == "0"))
        return read(self, block, start, stop)

    Reader.read = slowly
"""


@pytest.fixture
def troubled(recipe_values: Callable[..., dict[str, Any]], tmp_path: Path, warm: WarmProcess) -> Train:
    """Trains a model that has TROUBLE, 24 steps with a checkpoint every 5, into `run` of the test's directory."""
    package = write_user_package(tmp_path / "mine")
    values = recipe_values(run={"steps": 24}, health={"spike_window_steps": 8})
    values["model"] = {"kind": "own_package.models_of_mine:build_troubled"}
    recipe = write_recipe(tmp_path / "troubled.yaml", values)

    def train(trouble: str, *more: str, workers: int = 1, run: str = "run", site: Path | None = None) -> Result:
        places = [site, package, os.environ.get("PYTHONPATH")]
        env = environment(PYTHONPATH=os.pathsep.join(str(place) for place in places if place), TROUBLE=trouble)
        arguments = [recipe, f"run.directory={run}", *more]
        if workers == 1:
            return warm.worker(*arguments, cwd=tmp_path, env=env)
        return command(LOCKSTEP, "train", *arguments, "--workers", workers, cwd=tmp_path, env=env)

    return train


def columns(run: Path, name: str) -> dict[int, Any]:
    """step -> value of the steps whose line has this column."""
    return {record["step"]: record[name] for record in read_metrics(run)[0] if name in record}


def samples_of_step(dataset: Path, recipe: DataConfig, step: int, global_samples: int = 12) -> list[int]:
    samples = open_dataset(LocalStore(dataset), recipe, "train").samples
    positions = np.arange(global_samples * (step - 1), global_samples * step)
    return GlobalOrder(samples, 0).sample_ids(positions)[1].tolist()


# --- losses ----------------------------------------------------------------------------------------------------------


def test_a_spike_is_told_with_its_samples_and_the_run_goes_on(
    troubled: Train, dataset: Path, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    ended = troubled("spike:20").succeeded()
    spikes = columns(tmp_path / "run", "loss_spike")
    assert list(spikes) == [20]
    assert spikes[20] > 100
    ids = samples_of_step(dataset, DataConfig(**recipe_values()["data"]), 20)
    assert "step 20: loss" in ended.err
    assert f"the samples of step 20 are {', '.join(map(str, ids[:8]))} and 4 more" in ended.err
    assert ended.err.count("is a spike") == 1
    assert ", ".join(map(str, ids)) in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


def test_a_resumed_run_finds_the_spikes_that_it_would_have_found(troubled: Train, tmp_path: Path) -> None:
    """Of the eight losses that step 18 is compared with, five are from before the checkpoint."""
    straight, resumed = tmp_path / "straight", tmp_path / "run"
    troubled("spike:18", run="straight").succeeded()
    troubled("spike:18", "health.loss_spike=stop").failed_with(
        78, "step 18: loss", "the newest checkpoint is of step 15"
    )
    assert checkpoints(resumed)[-1] == "step-00000015"
    troubled("spike:18", "--resume", "auto").succeeded()
    assert history(resumed) == history(straight)
    assert columns(resumed, "loss_spike") == columns(straight, "loss_spike") != {}
    assert final_bytes(resumed) == final_bytes(straight)


def test_a_run_that_stops_at_a_spike_saves_nothing_that_has_seen_it(troubled: Train, tmp_path: Path) -> None:
    """Also where a save is due right after it; started again as it is, it ends the same way."""
    told = troubled("spike:20", "health.loss_spike=stop").failed_with(78, "step 20: loss", "health.loss_spike=warn")
    assert checkpoints(tmp_path / "run")[-1] == "step-00000015"
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (78, 20)
    assert list(columns(tmp_path / "run", "loss_spike")) == [20]
    again = troubled("spike:20", "health.loss_spike=stop", "--resume", "auto").failed_with(78, "step 20: loss")
    assert again == told


def test_spikes_may_be_ignored(troubled: Train, tmp_path: Path) -> None:
    ended = troubled("spike:20", "health.loss_spike=ignore").succeeded()
    assert columns(tmp_path / "run", "loss_spike") == {}
    assert "spike" not in ended.err


def test_no_checkpoint_holds_what_is_not_finite(troubled: Train, tmp_path: Path) -> None:
    """A weight that became infinite while every gradient was finite, as an update that is too large makes it."""
    troubled("infinite:13").failed_with(
        78, "step 15: not finite: model.output.bias;", "it was not saved", "the newest checkpoint is of step 10"
    )
    assert checkpoints(tmp_path / "run") == ["step-00000005", "step-00000010"]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_of_one_rank_ends_the_run_and_the_restart_repairs_it(troubled: Train, tmp_path: Path) -> None:
    every = "health.compare_replicas_every_steps=4"
    troubled("flip:11", every, workers=2).failed_with(
        1, "step 12: ranks that must hold the same bytes differ: rank 0 (", "rank 1 (", "model.output.weight",
        "the newest checkpoint is of step 10", "--resume auto",
    )  # fmt: skip
    run = tmp_path / "run"
    assert checkpoints(run)[-1] == "step-00000010"
    assert columns(run, "differing_ranks") == {12: [0, 1]}
    troubled("", every, "--resume", "auto", workers=2).succeeded()
    troubled("", every, workers=2, run="straight").succeeded()
    assert final_bytes(run) == final_bytes(tmp_path / "straight")
    assert history(run) == history(tmp_path / "straight")


@pytest.mark.long
def test_ranks_that_differ_again_and_again_at_one_step_end_the_run_with_78(troubled: Train, tmp_path: Path) -> None:
    ended = troubled("flip:11", "health.compare_replicas_every_steps=4", "run.max_restarts=9", workers=2)
    assert ended.code == 78, ended.err
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit_code"] == 78
    assert outcome["reason"].startswith(
        "died 3 times in the same way at step 12 and would again: rank 0 failed: step 12: "
    )
    died = json.loads((tmp_path / "run" / "post-mortem.json").read_text())
    assert [one["cause"] for one in (*died["earlier"], died)] == ["ended"] * 3


@pytest.mark.long
def test_differing_ranks_are_never_saved(troubled: Train, tmp_path: Path) -> None:
    """With no comparison due before the save, the save itself compares."""
    troubled("flip:13", workers=2).failed_with(1, "step 15: ranks that must hold the same bytes differ")
    assert checkpoints(tmp_path / "run")[-1] == "step-00000010"


@pytest.mark.long
def test_with_a_warning_the_run_goes_on_and_saves_nothing(troubled: Train, tmp_path: Path) -> None:
    ended = troubled(
        "flip:13", "health.differing_replicas=warn", "health.compare_replicas_every_steps=4", workers=2
    ).failed_with(78, "after step 24: step 24: ranks that must hold the same bytes differ")
    assert "checkpoint of step 15 not saved" in ended or checkpoints(tmp_path / "run")[-1] == "step-00000010"
    assert list(columns(tmp_path / "run", "differing_ranks")) == [16, 20, 24]
    assert checkpoints(tmp_path / "run")[-1] == "step-00000010"


@pytest.mark.long
def test_without_the_comparison_nobody_notices(troubled: Train, tmp_path: Path) -> None:
    """The control: what the two ranks train is two models from then on, and the run ends well."""
    never = "health.compare_replicas_every_steps=null"
    troubled("flip:13", never, workers=2).succeeded()
    troubled("", never, workers=2, run="straight").succeeded()
    assert final_bytes(tmp_path / "run") != final_bytes(tmp_path / "straight")


def test_a_slow_rank_is_named(troubled: Train, tmp_path: Path) -> None:
    ended = troubled("slow:1", "health.compare_paces_every_steps=6", "batch.micro_samples=6", workers=2).succeeded()
    run = tmp_path / "run"
    assert columns(run, "slowest_rank") == {6: 1, 12: 1, 18: 1, 24: 1}
    assert all(factor > 1.5 for factor in columns(run, "slowest_over_others").values())
    assert columns(run, "stragglers") == {18: [1], 24: [1]}
    (told,) = [line for line in ended.err.splitlines() if "is slow" in line]
    assert "step 18: rank 1 (" in told
    assert "times what it takes the others" in told


def test_a_run_stops_with_everything_saved_because_of_a_slow_rank(troubled: Train, tmp_path: Path) -> None:
    """It is slow in the backward pass; started again, on what should be other machines, the run goes on."""
    policy = ["health.compare_paces_every_steps=4", "batch.micro_samples=3"]
    ended = troubled("slow-backward:1", *policy, "health.slow_rank=stop", "run.steps=40", workers=2)
    run = tmp_path / "run"
    assert ended.code == 75, ended.err
    assert columns(run, "stragglers") == {12: [1]}
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["exit_code"] == 75
    assert outcome["reason"].startswith(f"stopped after step {outcome['step']} of 40: rank 1 (")
    assert f"lockstep: {outcome['reason']}" in ended.err
    assert 12 < outcome["step"] <= 15
    assert checkpoints(run)[-1] == f"step-{outcome['step']:08d}"
    ignored = troubled("slow-backward:1", *policy, "health.slow_rank=ignore", "run.steps=30", "--allow-change",
                       "--resume", "auto", workers=2).succeeded()  # fmt: skip
    assert columns(run, "slowest_rank")[28] == 1
    assert list(columns(run, "stragglers")) == [12]
    assert "is slow" not in ignored.err


@pytest.mark.parametrize("ranks", ["1", pytest.param("01", marks=pytest.mark.long)])
def test_a_rank_whose_data_is_slow_is_named(troubled: Train, tmp_path: Path, ranks: str) -> None:
    """The ranks exchange counts while they make data, and so all of them wait; where all are slow, none of them is, although
    one of them once stands still, while it makes steps of three comparisons."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        SLOW_SOURCE.format(ranks=set(ranks), pause_seconds=3 if ranks == "01" else 0)
    )
    ended = troubled("", "run.steps=36", "health.compare_paces_every_steps=3", workers=2, site=site).succeeded()
    told = [line for line in ended.err.splitlines() if "is slow" in line and "steps wait for data" in line]
    if ranks == "01":
        assert told == []
        return
    assert any(1 in stragglers for stragglers in columns(tmp_path / "run", "stragglers").values())
    assert told
    for line in told:
        assert ": rank 1 (" in line
        assert "times what it takes the others" in line


def test_a_run_may_be_examined_before_it_trains(troubled: Train, tmp_path: Path) -> None:
    ended = troubled("", "health.preflight=warn", "run.steps=2").succeeded()
    (told,) = [line for line in ended.err.splitlines() if line.startswith("preflight: ")]
    assert "matrix product, fp32" in told
    assert "disk, write" in told
    assert "run directory run: " in told
    assert "cache" not in told  # nothing is fetched
    assert told in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run", "troubled.yaml"]
