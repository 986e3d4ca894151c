"""Whole runs under the deepspeed engine: the run that the native engine makes, and checkpoints that either continues."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.runs import checkpoints, digests, final_bytes, lockstep, losses

DEEPSPEED = "parallel.engine=deepspeed"


@pytest.fixture(scope="module", params=[2, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 3))])
def run(request: pytest.FixtureRequest, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe on two workers, never interrupted, with a sample of text at its end."""
    folder = tmp_path_factory.mktemp("deepspeed")
    arguments = ["train", recipe, DEEPSPEED, f"parallel.zero_stage={request.param}", "run.directory=run"]
    ended = lockstep(*arguments, "evaluation.generated_tokens=8", "--workers", 2, cwd=folder).succeeded()
    assert "DeepSpeed" not in ended.out + ended.err, "it is to be silent"
    return folder / "run"


def test_a_deepspeed_run_is_the_native_run(run: Path, straight_run: Callable[..., Path]) -> None:
    assert digests(run) == digests(straight_run(2))
    assert losses(run) == pytest.approx(losses(straight_run(2)), rel=2e-6)
    (sample,) = (json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines())
    assert sample["text"]


def test_any_engine_continues_a_deepspeed_run(run: Path, straight_run: Callable[..., Path], tmp_path: Path) -> None:
    earlier = run / "checkpoints" / checkpoints(run)[0]
    arguments = ["train", run / "recipe.yaml", "--resume", earlier, "evaluation.generated_tokens=0"]
    native = ["parallel.engine=native", "parallel.zero_stage=0", "run.directory=native"]
    lockstep(*arguments, *native, "--workers", 2, cwd=tmp_path).succeeded()
    assert digests(tmp_path / "native") == digests(straight_run(2))[35:]
    assert losses(tmp_path / "native") == pytest.approx(losses(straight_run(2))[35:], rel=2e-6)
    assert "loss" in lockstep("evaluate", run, cwd=tmp_path).succeeded().out


@pytest.mark.long
def test_deepspeed_continues_a_native_run(straight_run: Callable[..., Path], tmp_path: Path) -> None:
    straight = straight_run(2)
    earlier = straight / "checkpoints" / checkpoints(straight)[0]
    layout = [DEEPSPEED, "parallel.zero_stage=3", "parallel.offload=parameters", "run.directory=run"]
    arguments = ["train", straight / "recipe.yaml", "--resume", earlier, *layout, "--workers", 2]
    lockstep(*arguments, cwd=tmp_path).succeeded()
    assert digests(tmp_path / "run") == digests(straight)[35:]
    assert losses(tmp_path / "run") == pytest.approx(losses(straight)[35:], rel=2e-6)


@pytest.mark.long
def test_a_run_that_starts_again_ends_in_the_same_bytes(run: Path, tmp_path: Path) -> None:
    earlier = run / "checkpoints" / checkpoints(run)[0]
    arguments = ["train", run / "recipe.yaml", "run.directory=again", "--resume", earlier, "--workers", 2]
    lockstep(*arguments, cwd=tmp_path).succeeded()
    assert final_bytes(tmp_path / "again") == final_bytes(run)


@pytest.mark.long
def test_one_worker_and_debug_need_no_launcher(recipe: Path, straight_run: Callable[..., Path], tmp_path: Path) -> None:
    arguments = ["train", recipe, DEEPSPEED, "parallel.zero_stage=1", "parallel.offload=optimizer"]
    lockstep(*arguments, "run.directory=one", "--workers", 1, cwd=tmp_path).succeeded()
    assert digests(tmp_path / "one") == digests(straight_run(2))
    lockstep(*arguments, "run.directory=debug", "batch.global_samples=12", "--debug", cwd=tmp_path).succeeded()
    assert digests(tmp_path / "debug") == digests(straight_run(2))[:5]


def test_debug_takes_the_dry_run_s_gradient_for_no_fault(recipe: Path, tmp_path: Path) -> None:
    """It starts from what is not a number, so that nothing of it is kept."""
    ended = lockstep("train", recipe, DEEPSPEED, "run.steps=1", "--debug", cwd=tmp_path).succeeded()
    assert "step 1/1" in ended.err


def test_a_file_that_contradicts_the_recipe_is_refused_before_a_worker_starts(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    arguments = ["train", recipe, DEEPSPEED, "parallel.zero_stage=2", "parallel.deepspeed_config=ds.json"]
    ended = lockstep(*arguments, "run.directory=run", cwd=tmp_path)
    ended.failed_with(
        2, "parallel.deepspeed_config=ds.json", "zero_optimization.stage=3", "parallel.zero_stage=2"
    )  # fmt: skip
    assert not (tmp_path / "run").exists()
