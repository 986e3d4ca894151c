"""What a run has consumed, and the proof of it: the counters that advance when a step commits (law 3)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data.digest import EMPTY_DIGEST, chain


@dataclass
class Ledger:
    """Position, counters and digest after the last committed step."""

    step: int = 0
    position: int = 0
    """Samples consumed, which is also the next sample's position."""
    items: int = 0
    """Items that losses were divided by: tokens with a target, or samples."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    """Skipped steps since the last one that was not."""
    digest: str = EMPTY_DIGEST
    """Chained over all steps from what was really read and went through forward."""

    def commit(self, *, samples: int, items: int, fold: int, skipped: bool) -> None:
        self.step += 1
        self.position += samples
        self.items += items
        self.skipped_steps += int(skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.digest = chain(self.digest, fold)

    def as_scalars(self) -> dict[str, Any]:
        return asdict(self)
