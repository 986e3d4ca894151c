"""The rows of a sweep: every combination of the values that `--sweep` names. Imports no torch."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import RunConfig
from launch.recipe import dump_recipe, load_recipe

MANIFEST_FILE = "sweep.tsv"
_OWN_KEYS = ("run.directory", "run.name")


@dataclass(frozen=True)
class Row:
    """One run of a sweep: its name, what it replaces in the recipe, and what the recipe is then."""

    name: str
    overrides: tuple[str, ...]
    config: RunConfig


def make_rows(recipe: str, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Row]:
    """A row for each combination, the last `--sweep` varying fastest. Raises ValueError where one is no valid recipe."""
    axes: list[list[str]] = []
    given = {override.partition("=")[0] for override in overrides}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        values = split_values(text)
        if not equals or not all(values):
            raise ValueError(f"--sweep {sweep}: must have the form section.key=A,B,..., such as optimizer.lr=1e-4,3e-4")
        if key in given:
            raise ValueError(f"--sweep {sweep}: {key} is given twice; remove one of them")
        if key in _OWN_KEYS:
            raise ValueError(f"--sweep {sweep}: every row has a {key} of its own; sweep another key")
        if "\t" in text or "\n" in text:
            raise ValueError(f"--sweep {sweep}: a value must not hold a tab or a new line")
        given.add(key)
        axes.append([f"{key}={value}" for value in values])
    base = load_recipe(recipe, overrides)
    rows = []
    for number, choice in enumerate(itertools.product(*axes), start=1):
        name = f"{number:03d}"
        replaced = (*choice, f"run.name={base.run.name}-{name}")
        row = Row(name, replaced, load_recipe(recipe, [*overrides, *replaced]))
        _refuse_other_meaning(base, row)
        rows.append(row)
    return rows


def format_manifest(rows: Sequence[Row]) -> str:
    """Lines `NAME<tab>section.key=value<tab>...`, as slurm/sweep.sbatch reads them."""
    return "".join("\t".join((row.name, *row.overrides)) + "\n" for row in rows)


def split_values(text: str) -> list[str]:
    """Splits at commas that stand neither in brackets nor in quotes: a value may itself be a list."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def _refuse_other_meaning(base: RunConfig, row: Row) -> None:
    """A job replaces keys in the resolved recipe: that must give what replacing them in the recipe itself gives."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resolved.yaml"
        path.write_text(dump_recipe(base), encoding="utf-8")
        try:
            resolved = load_recipe(str(path), row.overrides)
        except ValueError:
            resolved = base
    if resolved != row.config:
        raise ValueError(
            f"--sweep: {' '.join(row.overrides[:-1])} also changes what the recipe leaves to defaults; "
            "submit such runs one by one"
        )
