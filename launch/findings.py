"""What a run has found out about itself in a step, and how it names a rank."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distrib.world import World
from launch.exit_codes import RunEnded


@dataclass
class Findings:
    """What a step's numbers show."""

    columns: dict[str, Any] = field(default_factory=dict)
    """For the step's line in `metrics.jsonl`."""
    warnings: list[str] = field(default_factory=list)
    ending: RunEnded | None = None
    """What the run must end with, once the line is written."""
    stop: str | None = None
    """Why it must save and stop as if it had been asked to."""


def name_ranks(world: World, ranks: Sequence[int]) -> str:
    """Ranks with their hosts, for a person. All ranks call it together."""
    hosts = world.gather_objects(platform.node())
    return ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks)
