"""The file that `accelerate config` writes. `accelerate launch` alone reads it, and tells the processes that it starts by
variables; where anything else started them, what it asks would be passed over without a word. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distrib.accelerate_variables import MORE_THAN_COPIES, refuse_what_the_recipe_decides
from distrib.config import ParallelConfig

_REMEDY = "correct it, or remove it and run `accelerate config` again"


def refuse_what_nobody_reads(parallel: ParallelConfig) -> None:
    """Raises ValueError, in one line, where this run was not started by `accelerate launch` and the user's file asks for
    something else than the recipe. How many workers there are, and where, is for whoever starts them to say."""
    path = config_file()
    # A variable that `accelerate launch` always sets, and nobody by hand.
    if "ACCELERATE_DYNAMO_MODE" in os.environ or not path.is_file():
        return
    asked, names = {}, {}
    for variable, key, value in _wishes(_read(path)):
        asked[variable] = value
        names[variable] = f"{key}={value} in {path}"
    refuse_what_the_recipe_decides(parallel, asked, names)
    for variable, way_out in MORE_THAN_COPIES.items():
        if variable in asked:
            raise ValueError(
                f"{names[variable]}: parallel.engine=accelerate keeps a copy of the model on every rank, nothing else of "
                f"Accelerate has been run yet; {way_out}"
            )


def config_file() -> Path:
    """Where `accelerate config` writes, and `accelerate launch` looks."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    return Path(os.path.expanduser(home), "accelerate", "default_config.yaml")


def _wishes(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(variable that `accelerate launch` would set, key in the file, value), of what is not as it would be without a file."""
    precision = content.get("mixed_precision") or ("fp16" if content.get("fp16") else None)
    if precision:
        yield "ACCELERATE_MIXED_PRECISION", "mixed_precision", str(precision)
    dynamo = _section(content, "dynamo_config")
    backend = content.get("dynamo_backend") or dynamo.get("dynamo_backend") or dynamo.get("backend")
    if backend:
        yield "ACCELERATE_DYNAMO_BACKEND", "dynamo_backend", str(backend)
    if parallelism := _section(content, "parallelism_config"):
        yield "ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config", ",".join(parallelism)
    distributed = str(content.get("distributed_type"))
    if (variable := f"ACCELERATE_USE_{distributed}") in MORE_THAN_COPIES:
        yield variable, "distributed_type", distributed


def _section(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = content.get(key)
    return section if isinstance(section, dict) else {}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: what `accelerate config` wrote cannot be read ({reason}); {_REMEDY}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: what `accelerate config` wrote holds no keys; {_REMEDY}")
    return content
