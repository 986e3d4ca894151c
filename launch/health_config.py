"""The recipe's `health` section: what a run watches about itself, and what it does about it. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class HealthConfig(BaseModel):
    """What a run watches while it trains. Everything found is in `metrics.jsonl` and in rank 0's log."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preflight: Literal["none", "warn", "stop"] = "none"
    """Before training the ranks measure devices and memory and one rank a host its disks, some seconds long. What is broken, or
    full, ends the run with 78; what stays much slower than the others is told (warn), or ends it with 1 (stop)."""
    max_skipped_in_a_row: int | None = Field(default=20, ge=1)
    """Steps skipped one after the other, their gradients not finite, after which the run ends; null: never."""
    loss_spike: Literal["ignore", "warn", "stop"] = "warn"
    """A step's loss far above those before it. stop: the run ends with 78 before anything is saved that has seen that step."""
    spike_window_steps: int = Field(default=128, ge=8)
    """How many losses a loss is compared with; nothing is said before there are as many."""
    spike_deviations: float = Field(default=8.0, gt=0)
    """A spike is so many robust standard deviations (1.4826 times the median absolute deviation) above the median."""
    compare_paces_every_steps: int | None = Field(default=50, ge=1)
    """How often the ranks compare the time that each of them works alone on a micro-batch; null: never."""
    straggler_factor: float = Field(default=1.5, gt=1)
    """A rank that needs so many times what the others need, in three comparisons in a row, is slow."""
    slow_rank: Literal["ignore", "warn", "stop"] = "warn"
    """ignore: the comparisons are in `metrics.jsonl`, and nobody is named. stop: the run is saved and ends with 75, to be
    started again without that machine."""
    compare_replicas_every_steps: int | None = Field(default=100, ge=1)
    """How often ranks that must hold the same weights compare a checksum of theirs, besides before every checkpoint; null:
    never, not before checkpoints either."""
    differing_replicas: Literal["warn", "stop"] = "stop"
    """stop: the run ends with 1, to be started again from its newest checkpoint, in which all agreed. warn: it goes on, and
    saves nothing any more."""
