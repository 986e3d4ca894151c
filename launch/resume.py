"""Whether a resumed run may differ from what it was: every differing key is harmless, needs --allow-change, or is impossible.

Imports no torch.
"""

from __future__ import annotations

from typing import Any, Literal

from launch.config import RunConfig

Verdict = Literal["harmless", "needs --allow-change", "impossible"]

# Dotted keys, or whole sections by their name and a full stop; a key's own rule comes before its section's. The name of a
# stream is written as an asterisk.
_RULES: dict[Verdict, tuple[str, ...]] = {
    # What the run computes stays the same, or differs by rounding; data.source is held to the dataset's fingerprint.
    "harmless": (
        "run.name", "run.directory", "run.device", "run.max_restarts", "run.restart_backoff_seconds",
        "run.hang_timeout_seconds", "data.directory",
        "data.prefetch_steps", "data.source", "data.streams.*.source", "data.streams.*.directory", "data.workers",
        "data.cache_directory", "data.cache_bytes", "data.download_threads", "data.download_retries",
        "data.download_pause_seconds", "data.download_timeout_seconds", "batch.micro_samples",
        "parallel.engine", "parallel.zero_stage", "parallel.replicas", "parallel.offload",
        "parallel.activation_checkpointing", "parallel.compile", "parallel.deepspeed_config",
        "parallel.timeout_seconds", "checkpoint.", "evaluation.", "health.", "tracking.",
    ),
    # The curve differs from here on, which may be what is wanted. Augmentation alters training samples alone, neither which
    # ones they are nor what evaluation sees.
    "needs --allow-change": (
        "run.steps", "run.deterministic", "batch.global_samples", "optimizer.", "schedule.", "parallel.precision",
        "task.label_smoothing", "model.dropout", "data.max_epochs", "data.streams.", "data.augmentation.",
        "data.streaming_parts",
    ),
    # It would not be the same run: other samples, another function, or state that fits no more.
    "impossible": (
        "run.seed", "model.", "task.", "data.tokenizer", "data.validation_fraction", "data.sequence_tokens",
        "data.image_size_pixels", "data.image_channels", "data.shorter_side_pixels", "data.interpolation",
        "data.shard_bytes", "data.order", "data.lanes", "data.window_shards", "data.packing",
        "data.separate_documents", "data.streaming", "data.shuffle_buffer_samples", "optimizer.kind",
    ),
}  # fmt: skip
_VERDICTS: dict[str, Verdict] = {rule: verdict for verdict, rules in _RULES.items() for rule in rules}


def rule_of(key: str) -> str | None:
    """The rule that judges a dotted key; None for a key that nobody has thought of."""
    parts = key.split(".")
    if parts[:2] == ["data", "streams"]:
        parts[2:3] = ["*"]
    prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    candidates = [rule for prefix in prefixes for rule in (prefix, f"{prefix}.")]
    return next((rule for rule in candidates if rule in _VERDICTS), None)


def verdict_on(key: str) -> Verdict:
    """What a change of a dotted key is to a run that is resumed; "impossible" where no rule says otherwise."""
    rule = rule_of(key)
    return "impossible" if rule is None else _VERDICTS[rule]


def changed_keys(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, now) for every key that differs."""
    old, new = _flatten(before.model_dump(mode="json")), _flatten(now.model_dump(mode="json"))
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def refuse_impossible_changes(before: RunConfig, now: RunConfig, *, allow_change: bool) -> list[str]:
    """Returns the differences as `key: before -> now (verdict)` lines. Where one of them may not be, raises ValueError, in one
    line, with all of them."""
    lines = {key: f"{key}: {old} -> {new}" for key, (old, new) in changed_keys(before, now).items()}
    judged: dict[Verdict, list[str]] = {"impossible": [], "needs --allow-change": [], "harmless": []}
    for key, line in lines.items():
        judged[verdict_on(key)].append(line)
    told = "; ".join(f"{verdict}: {', '.join(found)}" for verdict, found in judged.items() if found)
    if judged["impossible"]:
        raise ValueError(f"the recipe differs from the run's: {told}; undo what is impossible, or start a new run")
    if judged["needs --allow-change"] and not allow_change:
        raise ValueError(f"the recipe differs from the run's: {told}; permit it with --allow-change")
    return [f"{line} ({verdict_on(key)})" for key, line in lines.items()]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
