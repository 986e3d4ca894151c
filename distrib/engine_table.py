"""The table that `lockstep engines` prints: what the check of a recipe answers, asked for every value. Imports no torch."""

from __future__ import annotations

import itertools
import textwrap
from typing import Any, Literal, get_args, get_origin

from distrib.capabilities import ENGINES, OPTIONS, refuse_unsupported
from distrib.config import ParallelConfig

_CELL_CHARACTERS = 28
_LEGEND = "replicas: N copies of the sharded model (hybrid sharding); N divides the number of workers"


def table_rows() -> list[tuple[str, list[list[str]]]]:
    """(what it is about, a cell for each engine), the engines in the order of ENGINES; a cell is a list of words."""
    rows = [(key, [_describe(engine, key) for engine in ENGINES]) for key in OPTIONS]
    rows.append(("launchers tried", [list(able.launchers) for able in ENGINES.values()]))
    rows.append(("run by the test suite", [["all of the above, on CPUs"]] * len(ENGINES)))
    rows.append(("not run yet", [list(able.not_run) for able in ENGINES.values()]))
    return rows


def format_table() -> str:
    """The table as text, long cells wrapped, under a line of the engines' names."""
    rows = [("parallel.engine", [[engine] for engine in ENGINES]), *table_rows()]
    label_characters = max(len(label) for label, _ in rows)
    lines: list[str] = []
    for label, cells in rows:
        wrapped = [_wrap(cell) for cell in cells]
        for parts in itertools.zip_longest([label], *wrapped, fillvalue=""):
            padded = [parts[0].ljust(label_characters), *(part.ljust(_CELL_CHARACTERS) for part in parts[1:])]
            lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, "", _LEGEND])


def _wrap(words: list[str]) -> list[str]:
    """The words on as many lines as they need, none of them broken."""
    unbreakable = ", ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words or ["-"])
    lines = textwrap.wrap(unbreakable, _CELL_CHARACTERS, break_on_hyphens=False, break_long_words=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def possible_values(key: str) -> dict[str, Any]:
    """What a recipe may say under `parallel.{key}`, by how it is shown; for a key that may stay empty, an example."""
    annotation = ParallelConfig.model_fields[key].annotation
    if get_origin(annotation) is Literal:
        return {str(value): value for value in get_args(annotation)}
    if annotation is bool:
        return {"false": False, "true": True}
    return {"N": 2} if int in get_args(annotation) else {"FILE": "FILE"}


def _describe(engine: str, key: str) -> list[str]:
    """The values that the engine takes, with the ZeRO stages where it takes them only at some."""
    stages = [stage for stage in possible_values("zero_stage").values() if _is_accepted(engine, zero_stage=stage)]
    if key == "zero_stage":
        return [str(stage) for stage in stages]
    described = []
    for shown, value in possible_values(key).items():
        accepted = [stage for stage in stages if _is_accepted(engine, zero_stage=stage, **{key: value})]
        if accepted == stages:
            described.append(shown)
        elif accepted:
            described.append(f"{shown} (stage {', '.join(map(str, accepted))})")
    return described


def _is_accepted(engine: str, **values: Any) -> bool:
    try:
        # Not validated: an example of a file need not exist.
        refuse_unsupported(ParallelConfig.model_construct(None, **{"engine": engine, **values}))
    except ValueError:
        return False
    return True
