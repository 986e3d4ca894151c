"""Whether a loss is far above the losses before it, by statistics that a spike itself can hardly move. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

# The median absolute deviation of a normal distribution is its standard deviation over 1.4826: P. J. Rousseeuw and C. Croux,
# "Alternatives to the Median Absolute Deviation", Journal of the American Statistical Association 88 (1993), page 1273.
MAD_TO_DEVIATION = 1.4826
# Losses that hardly differ have next to no deviation: it is taken as at least this share of the median.
_LEAST_DEVIATION = 1e-3


@dataclass(frozen=True)
class Spike:
    """A loss, and what it was compared with."""

    loss: float
    median: float
    deviations: float
    """How far the loss is above the median, in robust standard deviations; infinite for a loss that is not finite."""
    continues: bool
    """Whether the step before was a spike too."""


class SpikeDetector:
    """Judges the losses of steps in their order, each by those before it. Its state fits JSON, so that a resumed run judges as
    one that was never interrupted."""

    def __init__(self, window_steps: int, deviations: float) -> None:
        self._losses: deque[float] = deque(maxlen=window_steps)
        self._limit = deviations
        self._spiking = False

    def judge(self, loss: float) -> Spike | None:
        """Takes the next step's loss. A spike counts among the losses that later ones are compared with, so that a level which
        stays is soon none; a loss that is not finite does not."""
        spike = self._compare(loss) if len(self._losses) == self._losses.maxlen else None
        if math.isfinite(loss):
            self._losses.append(loss)
        self._spiking = spike is not None
        return spike

    def _compare(self, loss: float) -> Spike | None:
        median = statistics.median(self._losses)
        if loss <= median:
            return None
        if not math.isfinite(loss):
            return Spike(loss, median, math.inf, self._spiking)
        spread = statistics.median(abs(earlier - median) for earlier in self._losses)
        # Not 0: where a median is 0 and no loss differs from it, every rise is infinitely many deviations.
        deviation = max(MAD_TO_DEVIATION * spread, _LEAST_DEVIATION * abs(median), 5e-324)
        above = (loss - median) / deviation
        return Spike(loss, median, above, self._spiking) if above > self._limit else None

    def as_scalars(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "spiking": self._spiking}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Of more losses than the window holds, the newest stay."""
        self._losses.extend(scalars["losses"])
        self._spiking = scalars["spiking"]
