"""Whether a resumed run may differ from what it was: every differing key is harmless, needs --allow-change, or is impossible.

Imports no torch.
"""

from __future__ import annotations

from typing import Any

from launch.config import RunConfig

# Prefixes of dotted keys. What is in neither list is impossible to change: the run would not be the same run.
_HARMLESS = (
    "run.name", "run.directory", "run.device", "run.max_skipped_in_a_row", "data.directory", "data.prefetch_steps", "data.source",
    "batch.micro_samples", "parallel.engine", "parallel.zero_stage", "parallel.replicas", "parallel.offload",
    "parallel.activation_checkpointing", "parallel.compile", "parallel.timeout_seconds", "checkpoint.", "evaluation.",
    "tracking.",
)  # fmt: skip
_NEEDS_PERMISSION = (
    "run.steps", "run.deterministic", "batch.global_samples", "optimizer.", "schedule.", "parallel.precision",
    "task.label_smoothing", "model.dropout",
)  # fmt: skip
_IMPOSSIBLE = ("optimizer.kind",)


def changed_keys(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, now) for every key that differs."""
    old, new = _flatten(before.model_dump(mode="json")), _flatten(now.model_dump(mode="json"))
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def refuse_impossible_changes(before: RunConfig, now: RunConfig, *, allow_change: bool) -> list[str]:
    """Returns the differences as `key: before -> now` lines. Raises ValueError, in one line, for those that may not be."""
    differences = changed_keys(before, now)
    impossible, permitted = [], []
    for key, (old, new) in differences.items():
        line = f"{key}: {old} -> {new}"
        if key in _IMPOSSIBLE or not key.startswith(_HARMLESS + _NEEDS_PERMISSION):
            impossible.append(line)
        elif not key.startswith(_HARMLESS):
            permitted.append(line)
    if impossible:
        raise ValueError(
            f"the recipe differs from the run's in what cannot change: {'; '.join(impossible)}; start a new run"
        )
    if permitted and not allow_change:
        raise ValueError(f"the recipe differs from the run's: {'; '.join(permitted)}; permit it with --allow-change")
    return [f"{key}: {old} -> {new}" for key, (old, new) in differences.items()]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
