"""Whether a run whose workers died is started again, and when. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_LONGEST_BACKOFF_SECONDS = 60.0
# A replay is exact, so a mistake in the code that comes again at the same step will always come. A kill, a hang or replicas
# that differ may hit the same step twice by chance; three times is no chance. What depends on others (a store that cannot be
# reached) may last.
_REPEATS: dict[str, int | None] = {"exception": 2, "ended": 3, "signal": 3, "hang": 3, "exit": 3, "unavailable": None}


@dataclass(frozen=True)
class Death:
    """Why an attempt ended: what happened to the rank that is the cause."""

    rank: int
    phase: str
    step: int
    cause: Literal["exception", "ended", "signal", "hang", "exit", "unavailable"]
    """ended: by what the run found about itself, such as replicas that differ; unavailable: by what others did not give."""
    name: str
    """The exception's type, the signal, how it hung, or the exit code: a death of the same name is the same again."""
    reason: str
    """In one line."""


@dataclass(frozen=True)
class Again:
    """Start again after so many seconds."""

    number: int
    """The restart of those that are allowed without progress."""
    after_seconds: float


@dataclass(frozen=True)
class GiveUp:
    """Do not start again."""

    repeated: int | None
    """How often the run died in the same way at the same step, where that is why; None: the restarts are used up."""


class Restarts:
    """The budget of one supervisor: so many restarts, counted anew whenever a later checkpoint was published."""

    def __init__(self, allowed: int, backoff_seconds: float, newest_checkpoint: int | None) -> None:
        self.allowed = allowed
        self._backoff_seconds = backoff_seconds
        self._furthest = newest_checkpoint
        self._used = 0
        self._last: Death | None = None
        self._same = 0

    def after(self, death: Death, newest_checkpoint: int | None) -> Again | GiveUp:
        """What to do after a death. `newest_checkpoint`: the step of the last one that was published."""
        last, self._last = self._last, death
        same = last is not None and (last.step, last.cause, last.name) == (death.step, death.cause, death.name)
        self._same = self._same + 1 if same else 1
        if newest_checkpoint is not None and (self._furthest is None or newest_checkpoint > self._furthest):
            self._furthest, self._used = newest_checkpoint, 0
        if self.allowed == 0:
            return GiveUp(None)
        repeats = _REPEATS[death.cause]
        if repeats is not None and self._same >= repeats:
            return GiveUp(self._same)
        if self._used == self.allowed:
            return GiveUp(None)
        # The first is immediate: most deaths are of one machine's or one moment's making.
        wait = self._backoff_seconds * 2 ** (self._used - 1) if self._used else 0.0
        self._used += 1
        return Again(self._used, min(wait, _LONGEST_BACKOFF_SECONDS))
