"""One line of an examination: what was looked at, how it is, and what to do about it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launch.tables import format_table

State = Literal["ok", "slow", "broken"]


@dataclass(frozen=True)
class Check:
    """What was looked at, and what was found."""

    name: str
    state: State
    figure: str
    """What was measured or read."""
    advice: str = ""
    """What to do; only where something is to be done."""


def as_table(checks: Sequence[Check]) -> str:
    """A line a check."""
    rows = [("check", "state", "found")]
    rows += [(c.name, c.state, f"{c.figure}; {c.advice}" if c.advice else c.figure) for c in checks]
    return format_table(rows)


def rate(per_second: float, unit: str) -> str:
    """A rate with a decimal prefix, to three digits."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= size:
            return f"{per_second / size:.3g} {prefix}{unit}/s"
    return f"{per_second:.3g} {unit}/s"
