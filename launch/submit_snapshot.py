"""What a submitted job needs, copied beside it, so that later edits do not change a job that waits. Imports no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.config import RunConfig
from launch.own_code import OwnCode
from launch.recipe import dump_recipe
from launch.submit_script import CHECKOUT, PACKAGES
from launch.submit_sweep import Row

_CODE = (".py", ".sh", ".sbatch", ".yaml", ".html", ".css")
CODE_DIRECTORY = "code"
OWN_CODE_DIRECTORY = "own"
RECIPE_FILE = "recipe.yaml"
_DEEPSPEED_KEY = "parallel.deepspeed_config"


def take_snapshot(config: RunConfig, rows: Sequence[Row], own_code: OwnCode, folder: Path) -> list[Row]:
    """Writes `code/`, `own/` and `recipe.yaml` into `folder`: Lockstep itself, the user's own code, and the resolved recipe.
    The rows of a sweep are given back as they name the copies."""
    for package in PACKAGES:
        _copy_code(CHECKOUT / package, folder / CODE_DIRECTORY / package)
    own_code.copy_to(folder / OWN_CODE_DIRECTORY)
    config = _with_own_deepspeed_file(config, folder)
    (folder / RECIPE_FILE).write_text(dump_recipe(config), encoding="utf-8")
    return [_row_with_own_deepspeed_file(row, folder) for row in rows]


def _copy_code(source: Path, target: Path) -> None:
    """Sources and what a package ships beside them: a dataset that somebody keeps in there is not copied."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.suffix in _CODE:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _with_own_deepspeed_file(config: RunConfig, folder: Path) -> RunConfig:
    file = config.parallel.deepspeed_config
    if file is None:
        return config
    copy = folder / "deepspeed.json"
    shutil.copyfile(file, copy)
    parallel = config.parallel.model_copy(update={"deepspeed_config": copy})
    return config.model_copy(update={"parallel": parallel})


def _row_with_own_deepspeed_file(row: Row, folder: Path) -> Row:
    """A row that replaces the recipe's file by another one."""
    file = row.config.parallel.deepspeed_config
    place = next((n for n, word in enumerate(row.overrides) if word.startswith(f"{_DEEPSPEED_KEY}=")), None)
    if file is None or place is None:
        return row
    copy = folder / f"deepspeed-{row.name}.json"
    shutil.copyfile(file, copy)
    overrides = [*row.overrides[:place], f"{_DEEPSPEED_KEY}={json.dumps(str(copy))}", *row.overrides[place + 1 :]]
    return replace(row, overrides=tuple(overrides))
