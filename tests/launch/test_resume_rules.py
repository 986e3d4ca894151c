"""What a resumed run may change: harmless keys freely, some with --allow-change, the others never."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from launch.config import RunConfig
from launch.recipe import dump_recipe, load_recipe, parse_recipe, parse_yaml
from launch.resume import _VERDICTS, changed_keys, refuse_impossible_changes, rule_of, verdict_on

BEFORE = load_recipe("gpt-stdlib")
HARMLESS = [
    "run.name=other", "run.directory=somewhere", "run.device=cpu", "data.directory=elsewhere", "data.prefetch_steps=5",
    "batch.micro_samples=4", "parallel.timeout_seconds=30", "checkpoint.every_steps=7", "checkpoint.keep_last=9",
    "checkpoint.asynchronous=false", "parallel.compile=true",
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
    "data.packing=best_fit", "data.separate_documents=true", "optimizer.kind=sgd",
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
    assert line.endswith(" (harmless)")


@pytest.mark.parametrize("override", PERMITTED)
def test_what_alters_the_curve_needs_permission(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(
        ValueError, match=f"needs --allow-change: {key}: .* -> .*; permit it with --allow-change"
    ) as refused:
        refuse_impossible_changes(BEFORE, changed(override), allow_change=False)
    assert "\n" not in str(refused.value)
    assert any(line.startswith(key) for line in refuse_impossible_changes(BEFORE, changed(override), allow_change=True))


@pytest.mark.parametrize("override", IMPOSSIBLE)
@pytest.mark.parametrize("allow_change", [False, True])
def test_what_makes_another_run_is_impossible(override: str, allow_change: bool) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"impossible: (.*, )?{key}: .* -> .*start a new run"):
        refuse_impossible_changes(BEFORE, changed(override), allow_change=allow_change)


def test_augmentation_may_change_with_permission_and_workers_freely() -> None:
    before, augmented, workers, smoother = (
        load_recipe("resnet-digits", overrides)
        for overrides in ([], ["data.augmentation.flip=0.5"], ["data.workers=3"], ["data.interpolation=bicubic"])
    )
    for first, second in ((before, augmented), (augmented, before)):
        with pytest.raises(
            ValueError, match=r"needs --allow-change: data\.augmentation.flip: .* permit it with --allow-change"
        ):
            refuse_impossible_changes(first, second, allow_change=False)
        assert refuse_impossible_changes(first, second, allow_change=True)
    assert refuse_impossible_changes(before, workers, allow_change=False) == ["data.workers: 0 -> 3 (harmless)"]
    with pytest.raises(ValueError, match=r"impossible: data\.interpolation"):
        refuse_impossible_changes(before, smoother, allow_change=True)


def test_nothing_changed_is_nothing_told() -> None:
    assert refuse_impossible_changes(BEFORE, load_recipe("gpt-stdlib"), allow_change=False) == []


def keys_of(section: type[BaseModel], prefix: str = "") -> set[str]:
    """Every dotted key that a recipe can hold, of every kind of model."""
    keys: set[str] = set()
    for name, field in section.model_fields.items():
        parts = list(sections_in(field.annotation))
        named = "*." if get_origin(field.annotation) is dict else ""  # sections under names that a user chooses
        for part in parts:
            keys |= keys_of(part, f"{prefix}{name}.{named}")
        if not parts or type(None) in get_args(field.annotation):
            keys.add(prefix + name)
    return keys


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation names, in unions too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def test_every_key_is_judged() -> None:
    """By a rule of its own or of its section: a new key must be thought of here."""
    keys = keys_of(RunConfig)
    assert {"model.kind", "model.rope_scaling", "model.rope_scaling.factor", "model.widths", "model.options"} <= keys
    assert len(keys) > 80
    assert {key for key in keys if rule_of(key) is None} == set()
    assert verdict_on("run.what_nobody_thought_of") == "impossible"


def test_no_rule_is_about_nothing() -> None:
    used = {rule_of(key) for key in keys_of(RunConfig)}
    assert set(_VERDICTS) - used == set()


@pytest.mark.parametrize(
    ("verdict", "overrides"),
    [("harmless", HARMLESS), ("needs --allow-change", PERMITTED), ("impossible", IMPOSSIBLE)],
)
def test_verdicts(verdict: str, overrides: list[str]) -> None:
    assert {verdict_on(override.partition("=")[0]) for override in overrides} == {verdict}


def test_keys_of_streams_are_judged() -> None:
    """They mean nothing to the recipe above, and cannot be changed in it."""
    assert verdict_on("data.streaming") == verdict_on("data.shuffle_buffer_samples") == "impossible"
    assert verdict_on("data.streaming_parts") == "needs --allow-change"


def test_all_differences_are_told_at_once_each_as_what_it_is() -> None:
    overrides = ["run.seed=1", "model.layers=5", "optimizer.lr=1e-3", "checkpoint.every_steps=7", "run.steps=900"]
    now = load_recipe("gpt-stdlib", overrides)
    assert set(changed_keys(BEFORE, now)) == {override.partition("=")[0] for override in overrides}
    for allow_change in (False, True):
        with pytest.raises(ValueError, match="the recipe differs") as refused:
            refuse_impossible_changes(BEFORE, now, allow_change=allow_change)
        assert str(refused.value) == (
            "the recipe differs from the run's: impossible: model.layers: 4 -> 5, run.seed: 0 -> 1; "
            "needs --allow-change: optimizer.lr: 0.003 -> 0.001, run.steps: 400 -> 900; "
            "harmless: checkpoint.every_steps: 200 -> 7; undo what is impossible, or start a new run"
        )
    possible = load_recipe("gpt-stdlib", [override for override in overrides if override[:3] not in ("mod", "run")])
    with pytest.raises(ValueError, match="the recipe differs") as refused:
        refuse_impossible_changes(BEFORE, possible, allow_change=False)
    assert str(refused.value) == (
        "the recipe differs from the run's: needs --allow-change: optimizer.lr: 0.003 -> 0.001; "
        "harmless: checkpoint.every_steps: 200 -> 7; permit it with --allow-change"
    )
    assert len(refuse_impossible_changes(BEFORE, possible, allow_change=True)) == 2
