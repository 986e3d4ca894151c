"""What a resumed run may change: harmless keys freely, some with --allow-change, the others never."""

from __future__ import annotations

import pytest

from launch.config import RunConfig
from launch.recipe import dump_recipe, load_recipe, parse_recipe, parse_yaml
from launch.resume import changed_keys, refuse_impossible_changes

BEFORE = load_recipe("gpt-stdlib")
HARMLESS = [
    "run.name=other", "run.directory=somewhere", "run.device=cpu", "data.directory=elsewhere", "data.prefetch_steps=5",
    "batch.micro_samples=4", "parallel.timeout_seconds=30", "checkpoint.every_steps=7", "checkpoint.keep_last=9",
    "evaluation.samples=3", "evaluation.prompt=hello", "tracking.wandb=off", "tracking.tensorboard=false",
]  # fmt: skip
PERMITTED = [
    "run.steps=900", "run.deterministic=true", "batch.global_samples=64", "optimizer.lr=1e-3", "optimizer.clip_norm=null",
    "optimizer.weight_decay=0", "schedule.kind=linear", "schedule.warmup_steps=3", "parallel.precision=bf16",
    "task.label_smoothing=0.1", "model.dropout=0.2",
]  # fmt: skip
IMPOSSIBLE = [
    "run.seed=1", "model.layers=5", "model.width=96", "model.norm=layernorm", "model.kind=my.module:build",
    "data.tokenizer=bytes", "data.sequence_tokens=64", "data.validation_fraction=0.1", "data.shard_bytes=1000",
    "optimizer.kind=sgd",
]  # fmt: skip


def changed(override: str) -> RunConfig:
    overrides = [override]
    if override.startswith("model.kind"):
        recipe = parse_yaml(dump_recipe(BEFORE), "recipe")
        recipe["model"] = {"kind": override.partition("=")[2]}
        return parse_recipe(recipe, source="recipe")
    return load_recipe("gpt-stdlib", overrides)


@pytest.mark.parametrize("override", HARMLESS)
def test_harmless_keys_change_freely(override: str) -> None:
    [line] = refuse_impossible_changes(BEFORE, changed(override), allow_change=False)
    assert line.startswith(override.partition("=")[0] + ": ")


@pytest.mark.parametrize("override", PERMITTED)
def test_what_alters_the_curve_needs_permission(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"{key}: .* -> .*--allow-change") as refused:
        refuse_impossible_changes(BEFORE, changed(override), allow_change=False)
    assert "\n" not in str(refused.value)
    assert any(line.startswith(key) for line in refuse_impossible_changes(BEFORE, changed(override), allow_change=True))


@pytest.mark.parametrize("override", IMPOSSIBLE)
@pytest.mark.parametrize("allow_change", [False, True])
def test_what_makes_another_run_is_impossible(override: str, allow_change: bool) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"cannot change.*{key}: .* -> .*start a new run"):
        refuse_impossible_changes(BEFORE, changed(override), allow_change=allow_change)


def test_nothing_changed_is_nothing_told() -> None:
    assert refuse_impossible_changes(BEFORE, load_recipe("gpt-stdlib"), allow_change=False) == []


def test_every_section_has_a_judged_key() -> None:
    judged = [override.partition("=")[0] for override in HARMLESS + PERMITTED + IMPOSSIBLE]
    sections = {key.partition(".")[0] for key in judged}
    assert sections == set(RunConfig.model_fields)


def test_all_differences_are_named_at_once() -> None:
    now = load_recipe("gpt-stdlib", ["run.seed=1", "model.layers=5", "optimizer.lr=1e-3"])
    assert set(changed_keys(BEFORE, now)) == {"run.seed", "model.layers", "optimizer.lr"}
    with pytest.raises(ValueError, match=r"model\.layers: 4 -> 5; run\.seed: 0 -> 1"):
        refuse_impossible_changes(BEFORE, now, allow_change=True)
