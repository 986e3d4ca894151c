"""`lockstep engines`: the printed table, the check of a recipe and the README say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distrib.capabilities import ENGINES, OPTIONS
from distrib.config import ParallelConfig
from distrib.engine_table import format_table, possible_values, table_rows
from launch.recipe import load_recipe
from tests.launch.test_recipe import GOOD, answers_without_torch
from tests.test_house import ROOT

STAGES = (0, 1, 2, 3)
# Keys that stay empty unless a file is named, which would have to exist.
OPTIONS_OF_VALUES = [key for key in OPTIONS if "FILE" not in possible_values(key)]
PAIRS = [(engine, key) for engine in ENGINES for key in OPTIONS_OF_VALUES]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("engines") / "good.yaml"
    path.write_text(GOOD)
    return str(path)


def refusal_of(good: str, engine: str, stage: int, **values: object) -> str | None:
    """Why the recipe is refused, or None."""
    settings = {"engine": engine, "zero_stage": stage, **values}
    try:
        load_recipe(good, [f"parallel.{key}={str(value).lower()}" for key, value in settings.items()])
    except ValueError as error:
        return str(error)
    return None


def cell_of(engine: str, key: str) -> str:
    return ", ".join(dict(table_rows())[key][list(ENGINES).index(engine)])


@pytest.mark.parametrize(("engine", "key"), PAIRS)
def test_the_table_and_the_check_of_a_recipe_agree(engine: str, key: str, good: str) -> None:
    stages = [stage for stage in STAGES if refusal_of(good, engine, stage) is None]
    if key == "zero_stage":
        assert cell_of(engine, key) == ", ".join(map(str, stages))
        return
    expected = []
    for shown, value in possible_values(key).items():
        accepted = [stage for stage in stages if refusal_of(good, engine, stage, **{key: value}) is None]
        if accepted:
            limited = "" if accepted == stages else f" (stage {', '.join(map(str, accepted))})"
            expected.append(shown + limited)
    assert cell_of(engine, key) == ", ".join(expected)


@pytest.mark.parametrize(("engine", "key"), PAIRS)
def test_a_refusal_names_the_engines_that_can(engine: str, key: str, good: str) -> None:
    for stage in STAGES:
        for value in [stage] if key == "zero_stage" else possible_values(key).values():
            values = {} if key == "zero_stage" else {key: value}
            refusal = refusal_of(good, engine, stage, **values)
            if refusal is None:
                continue
            able = {other for other in ENGINES if refusal_of(good, other, stage, **values) is None}
            named = re.search(r"engines that can: (.*)", refusal)
            assert f"is not supported by parallel.engine={engine}" in refusal
            assert able <= set(named[1].split(", ") if named else []), refusal


def test_every_option_of_the_recipe_is_in_the_table() -> None:
    elsewhere = {"engine", "timeout_seconds"}
    assert set(OPTIONS) == set(ParallelConfig.model_fields) - elsewhere
    assert [label for label, _ in table_rows()][: len(OPTIONS)] == list(OPTIONS)


def test_the_command_prints_what_the_readme_shows(tmp_path: Path) -> None:
    [[code, out, err]] = answers_without_torch([["engines"]], tmp_path)
    assert (code, err) == (0, "")
    assert out == format_table() + "\n"
    assert max(len(line) for line in out.splitlines()) <= 120
    for engine in ENGINES:
        assert engine in out.splitlines()[0]
    assert f"```\n$ lockstep engines\n{out}```" in (ROOT / "README.md").read_text()
