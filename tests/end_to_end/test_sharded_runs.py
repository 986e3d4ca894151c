"""Whole runs with ZeRO sharding: the run that replicated workers make, and checkpoints that any of them continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.runs import checkpoints, digests, final_bytes, lockstep, losses


@pytest.fixture(scope="module", params=[3, pytest.param(2, marks=pytest.mark.long)])
def sharded(request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe on two workers at ZeRO stage 2 or 3, never interrupted, with a sample of text at its end."""
    folder = tmp_path_factory.mktemp("sharded")
    arguments = ["train", recipe, f"parallel.zero_stage={request.param}", "run.directory=run", "--workers", 2]
    lockstep(*arguments, "evaluation.generated_tokens=8", cwd=folder).succeeded()
    return folder / "run"


def test_a_sharded_run_is_the_replicated_run(sharded: Path, straight_run: Callable[..., Path]) -> None:
    assert digests(sharded) == digests(straight_run(2))
    assert losses(sharded) == pytest.approx(losses(straight_run(2)), rel=2e-6)
    (sample,) = (json.loads(line) for line in (sharded / "samples.jsonl").read_text().splitlines())
    assert sample["text"]


def test_a_sharded_run_that_starts_again_ends_in_the_same_bytes(sharded: Path, tmp_path: Path) -> None:
    earlier = sharded / "checkpoints" / checkpoints(sharded)[0]
    arguments = ["train", sharded / "recipe.yaml", "run.directory=again", "--resume", earlier, "--workers", 2]
    lockstep(*arguments, cwd=tmp_path).succeeded()
    assert final_bytes(tmp_path / "again") == final_bytes(sharded)


@pytest.mark.long
def test_any_layout_continues_a_sharded_run(sharded: Path, straight_run: Callable[..., Path], tmp_path: Path) -> None:
    earlier = sharded / "checkpoints" / checkpoints(sharded)[0]
    arguments = ["train", sharded / "recipe.yaml", "--resume", earlier, "evaluation.generated_tokens=0"]
    for name, workers, layout in (("three", 3, "parallel.zero_stage=3"), ("one", 1, "parallel.zero_stage=0")):
        lockstep(*arguments, f"run.directory={name}", layout, "--workers", workers, cwd=tmp_path).succeeded()
        assert digests(tmp_path / name) == digests(straight_run(2))[35:]
    assert "loss" in lockstep("evaluate", sharded, cwd=tmp_path).succeeded().out


def test_replicas_that_do_not_come_out_even_are_refused_before_a_worker_starts(recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", recipe, "parallel.zero_stage=3", "parallel.replicas=2", "run.directory=run", "--workers", 3]
    ended = lockstep(*arguments, cwd=tmp_path)
    ended.failed_with(2, "parallel.replicas=2: does not divide the 3 workers")
    assert not (tmp_path / "run").exists()
