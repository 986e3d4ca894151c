"""What `accelerate config` and `accelerate launch` ask of a process, in its environment. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from distrib.config import ParallelConfig

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_ELSEWHERE = "use parallel.engine=native parallel.zero_stage=3, or remove it from `accelerate config`"
# What asks Accelerate for more than copies of the model, and the way out.
MORE_THAN_COPIES = {
    "ACCELERATE_USE_FSDP": _ELSEWHERE,
    "ACCELERATE_USE_DEEPSPEED": f"use parallel.engine=deepspeed, {_ELSEWHERE}",
    "ACCELERATE_USE_MEGATRON_LM": _ELSEWHERE,
}


def refuse_what_the_recipe_decides(
    parallel: ParallelConfig,
    asked: Mapping[str, str] = os.environ,
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raises ValueError where the variables in `asked` decide what the recipe decides, and otherwise. `names`: what a message
    calls a variable that the user never set."""

    def said(variable: str) -> str:
        return names.get(variable, f"{variable}={asked.get(variable)}")

    # `accelerate launch` says "no" where nobody asked for anything.
    precision = asked.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", _PRECISIONS[parallel.precision]):
        raise ValueError(
            f"{said('ACCELERATE_MIXED_PRECISION')}, but parallel.precision={parallel.precision}: set parallel.precision, "
            "and remove mixed_precision from `accelerate config`"
        )
    if asked.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            f"{said('ACCELERATE_DYNAMO_BACKEND')}: the recipe decides about compiling; set parallel.compile=true, and "
            "remove dynamo from `accelerate config`"
        )
    if asked.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise ValueError(
            f"{said('ACCELERATE_GRADIENT_ACCUMULATION_STEPS')}: accumulation follows from batch.global_samples and "
            "batch.micro_samples; remove it from `accelerate config`"
        )
    if is_set("ACCELERATE_USE_PARALLELISM_CONFIG", asked):
        raise ValueError(
            f"{said('ACCELERATE_USE_PARALLELISM_CONFIG')}: the recipe decides how the model is divided among the ranks; "
            f"{_ELSEWHERE}"
        )


def refuse_what_goes_unread(parallel: ParallelConfig) -> None:
    """For the other engines, which may be started by `accelerate launch`, too, and read nothing of its configuration."""
    refuse_what_the_recipe_decides(parallel)
    for variable, way_out in MORE_THAN_COPIES.items():
        if is_set(variable):
            raise ValueError(
                f"{variable}={os.environ[variable]}: parallel.engine={parallel.engine} does not read `accelerate config`; "
                f"{way_out}"
            )


def is_set(variable: str, asked: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable that stands for yes or no says yes."""
    # Accelerate itself takes "true" alone, and passes over a "1" without a word.
    return asked.get(variable, "").lower() not in ("", "false", "0", "no")
