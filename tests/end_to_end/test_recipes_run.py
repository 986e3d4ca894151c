"""Every shipped recipe trains, shortened or made small, and so does a user's own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.attempt import format_metrics
from launch.recipe import SHIPPED_RECIPES
from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import (
    WarmProcess,
    checkpoints,
    environment,
    final_bytes,
    history,
    lockstep,
    losses,
    write_recipe,
)
from tests.end_to_end.user_models import write_user_package

QUIET = ["tracking.wandb=off", "tracking.tensorboard=false", "run.steps=3", "schedule.warmup_steps=1"]
SMALL_TEXT = [
    "data.source=stdlib", "data.tokenizer=bytes", "data.validation_fraction=0.05", "batch.global_samples=4",
    "batch.micro_samples=2", "evaluation.samples=4", "evaluation.every_steps=2", "evaluation.generated_tokens=3",
]  # fmt: skip
# Recipe -> what makes it small enough for a test; what makes it itself stays.
SHORTENED = {
    "gpt-stdlib": [*SMALL_TEXT],
    "lenet-digits": [],
    "resnet-digits": ["batch.global_samples=8", "batch.micro_samples=4", "evaluation.samples=8"],
    "resnet50-imagenet": [
        "data.source=digits", "data.validation_fraction=0.2", "data.image_size_pixels=32", "data.shorter_side_pixels=36",
        "data.workers=2", "model.layers=18", "batch.global_samples=8", "batch.micro_samples=4", "evaluation.samples=8",
    ],
    "gpt2-124m": [
        *SMALL_TEXT, "model.layers=2", "model.width=64", "model.heads=4", "model.vocabulary_size=300",
        "model.context_tokens=64", "data.sequence_tokens=64",
    ],
    "llama-1b": [
        *SMALL_TEXT, "model.layers=2", "model.width=64", "model.heads=4", "model.key_value_heads=2",
        "model.feed_forward_width=128", "model.vocabulary_size=300", "model.context_tokens=64", "data.sequence_tokens=64",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes run: what one of them prepared, the next one finds."""
    return tmp_path_factory.mktemp("recipes")


def test_no_shipped_recipe_is_left_out() -> None:
    assert set(SHORTENED) == {path.stem for path in SHIPPED_RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("name", SHORTENED)
def test_a_shipped_recipe_trains(warm: WarmProcess, name: str, workplace: Path) -> None:
    arguments = [name, *QUIET, *SHORTENED[name], f"run.directory={name}"]
    warm.worker(*arguments, cwd=workplace).succeeded()
    steps, evaluations = read_metrics(workplace / name)
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert not any(record["skipped"] for record in steps)
    assert evaluations[0]["step"] == 0
    assert evaluations[-1]["step"] == 3
    assert checkpoints(workplace / name)[-1] == "step-00000003"


def own_recipe(recipe_values: Callable[..., dict[str, Any]], function: str, **options: Any) -> dict[str, Any]:
    values = recipe_values(run={"steps": 6}, checkpoint={"every_steps": 3})
    values["model"] = {"kind": f"own_package.models_of_mine:{function}", "options": options}
    return values


@pytest.mark.parametrize("function", ["build", "build_with_methods"])
def test_a_users_own_model_trains_and_resumes(
    warm: WarmProcess, function: str, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "own.yaml", own_recipe(recipe_values, function, width=24))
    env = environment(PYTHONPATH=str(write_user_package(tmp_path / "mine")))
    warm.worker(recipe, "run.directory=straight", cwd=tmp_path, env=env).succeeded()
    arguments = [recipe, "run.directory=halves", "--resume", "auto", "--allow-change"]
    warm.worker(*arguments, "run.steps=3", "schedule.kind=constant", cwd=tmp_path, env=env).succeeded()
    resumed = warm.worker(*arguments, cwd=tmp_path, env=env).succeeded()
    assert "resumed from step 3" in resumed.err
    straight, halves = history(tmp_path / "straight"), history(tmp_path / "halves")
    assert [row[0] for row in halves] == [1, 2, 3, 4, 5, 6]
    assert halves[0][3] == straight[0][3]
    assert [row[-1] for row in halves] == [row[-1] for row in straight]
    header = (tmp_path / "straight" / "checkpoints" / "step-00000006" / "model-00001.safetensors").read_bytes()
    names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert names["model.embedding.weight"]["shape"] == [257, 24]


def test_a_model_with_a_parameter_that_no_loss_depends_on_is_the_same_at_every_world(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "own.yaml", own_recipe(recipe_values, "build_with_unused"))
    env = environment(PYTHONPATH=str(write_user_package(tmp_path / "mine")))
    for workers in (1, 2):
        arguments = ["train", recipe, f"run.directory=world-{workers}", "--workers", workers]
        lockstep(*arguments, cwd=tmp_path, env=env).succeeded()
    one, two = (losses(tmp_path / f"world-{workers}") for workers in (1, 2))
    assert two == pytest.approx(one, rel=2e-6)


def test_running_statistics_that_are_saved_are_those_that_were_evaluated(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Each worker sees other samples, and with 11 samples over 2 workers, 3 at a time, one of them runs a filler."""
    values = own_recipe(recipe_values, "build_with_batch_norm")
    values["batch"] = {"global_samples": 11, "micro_samples": 3}
    values["evaluation"] = {"every_steps": 3}
    recipe = write_recipe(tmp_path / "own.yaml", values)
    env = environment(PYTHONPATH=str(write_user_package(tmp_path / "mine")))
    keywords: dict[str, Any] = {"cwd": tmp_path, "env": env}
    lockstep("train", recipe, "run.directory=straight", "--workers", 2, **keywords).succeeded()
    last = read_metrics(tmp_path / "straight")[1][-1]
    shown = lockstep("evaluate", "straight", **keywords).succeeded()
    assert f": {format_metrics(last['evaluation'])}" in shown.out

    checkpoint = tmp_path / "straight" / "checkpoints" / "step-00000003"
    lockstep("train", recipe, "run.directory=fork", "--resume", checkpoint, "--workers", 2, **keywords).succeeded()
    assert read_metrics(tmp_path / "fork")[1][-1]["evaluation"] == last["evaluation"]
    assert final_bytes(tmp_path / "fork") == final_bytes(tmp_path / "straight")


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("own_package.missing:build", {}, ["no module named 'own_package.missing'", "PYTHONPATH"]),
        ("own_package.models_of_mine:missing", {}, ["has no function 'missing'"]),
        ("own_package.models_of_mine:build", {"widht": 3}, ["unexpected keyword argument 'widht'", "model.options"]),
        ("no_such_package.models:build", {}, ["no module named 'no_such_package'", "PYTHONPATH"]),
    ],
)
def test_a_users_model_that_is_not_there(
    warm: WarmProcess,
    kind: str,
    options: dict[str, Any],
    parts: list[str],
    recipe_values: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    values = recipe_values()
    values["model"] = {"kind": kind, "options": options}
    recipe = write_recipe(tmp_path / "own.yaml", values)
    env = environment(PYTHONPATH=str(write_user_package(tmp_path / "mine")))
    ended = warm.worker(recipe, "run.directory=run", cwd=tmp_path, env=env)
    ended.failed_with(2, "model.kind", *parts)


def test_a_users_model_is_found_where_the_user_stands(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Without PYTHONPATH."""
    recipe = write_recipe(tmp_path / "own.yaml", own_recipe(recipe_values, "build"))
    folder = write_user_package(tmp_path / "mine")
    lockstep("train", recipe, "run.directory=run", "run.steps=1", "--workers", 1, cwd=folder).succeeded()
    shown = lockstep("evaluate", "run", cwd=folder).succeeded()
    assert "loss" in shown.out


@pytest.mark.long
def test_the_default_recipe_learns(tmp_path: Path) -> None:
    """As `make train` runs it, with fewer steps: two workers, its own tokenizer, its own data."""
    arguments = ["train", "gpt-stdlib", "run.steps=60", "tracking.wandb=off", "tracking.tensorboard=false"]
    ended = lockstep(*arguments, "run.directory=run", cwd=tmp_path).succeeded()
    _, evaluations = read_metrics(tmp_path / "run")
    before, after = evaluations[0]["evaluation"], evaluations[-1]["evaluation"]
    assert after["bits_per_byte"] < 0.8 * before["bits_per_byte"]
    for part in ("evaluation before:", "evaluation after:", "a sample of its text:", "everything lies in run", "next:"):
        assert part in ended.err + ended.out
