"""Ranks that are slower than the others at their own part of the work: computing, or making the data that it needs.

A step takes every rank as long as the slowest of them, so what is compared is what a rank does between two exchanges. Every
rank judges the same numbers, which travel with the step's own, and so comes to the same conclusion.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence

from data.making_time import MakingTime
from distrib.engine import Engine
from launch.findings import Findings, name_ranks
from launch.health_config import HealthConfig

log = logging.getLogger("lockstep")

PACE_NUMBERS = 6
"""What a rank tells of how fast it is: seconds and rows of a micro-batch, seconds and samples of a step's data, the share of
its time that it has waited for data, and whether these three are new since it told them last."""
# In how many steps before a comparison a micro-batch is timed: the median is compared.
_TIMED_STEPS = 8
# A rank that is slow in so many comparisons one after the other is named.
_SLOW_IN_A_ROW = 3
# Where training waits less for data than this share of its time, making them costs it nothing that matters.
_WAITS_FOR_DATA = 0.1


class Stragglers:
    """Compares the ranks of an attempt, every so many steps."""

    def __init__(self, config: HealthConfig, engine: Engine) -> None:
        self._config = config
        self._world = engine.world
        self._pace = engine.pace
        self._making_time: MakingTime | None = None
        self._every = config.compare_paces_every_steps if engine.world.size > 1 else None
        self._since = time.perf_counter()
        self._waited_seconds = 0.0
        self._data_numbers = [math.nan] * 3
        self._slow_computing: dict[int, int] = {}
        """In how many comparisons in a row each rank was slow."""
        self._slow_with_data: dict[int, int] = {}
        if self._every is not None and self._pace.unknown_because:
            log.info("ranks that compute slowly are not looked for: %s", self._pace.unknown_because)

    def watch_data(self, making_time: MakingTime) -> None:
        """From now on the making of data is compared, too."""
        self._making_time = making_time
        self._since = time.perf_counter()

    def step_was_begun(self, step: int, data_wait_seconds: float) -> None:
        """After it has waited so long for its data. The next one is timed where a comparison is near."""
        self._waited_seconds += data_wait_seconds
        if self._every is not None and -(step + 1) % self._every < _TIMED_STEPS:
            self._pace.ask()

    def compares_at(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def own_numbers(self) -> list[float]:
        """This rank's, (PACE_NUMBERS,); not a number where it has none."""
        # Many small steps may be made at once. Until the next are, those numbers hold that were true of the last ones, and the
        # wait for the next belongs to these.
        made = None if self._making_time is None else self._making_time.take()
        if made is not None:
            now = time.perf_counter()
            self._data_numbers = [*made, self._waited_seconds / (now - self._since)]
            self._since, self._waited_seconds = now, 0.0
        return [*self._pace.take(), *self._data_numbers, float(made is not None)]

    def judge(self, told: Sequence[Sequence[float]], step: int, findings: Findings) -> None:
        """Looks at what all ranks have told, each its `own_numbers`."""
        computing = _slowness_of_computing([(seconds, int(rows)) for seconds, rows, *_ in told])
        if computing:
            slowest = max(computing, key=lambda rank: computing[rank])
            findings.columns |= {"slowest_rank": slowest, "slowest_over_others": computing[slowest]}
            self._slow_computing = self._count(self._slow_computing, computing)
            for rank in self._named_now(self._slow_computing):
                what = f"its own work on a micro-batch takes it {1e3 * told[rank][0]:.3g} ms"
                self._tell(rank, what, computing[rank], "look at that machine", step, findings)
        waited = statistics.median(share for *_, share, _ in told)
        with_data = _slowness_with_data([(seconds, samples) for _, _, seconds, samples, *_ in told])
        # A rank is not slow again because it tells again how slow it was.
        new = {rank for rank, numbers in enumerate(told) if numbers[-1]}
        before = self._slow_with_data
        looks = self._count(before, with_data if waited >= _WAITS_FOR_DATA else {})
        self._slow_with_data = {
            r: count if r in new else before[r] for r, count in looks.items() if r in new or r in before
        }
        for rank in sorted(new.intersection(self._named_now(self._slow_with_data))):
            what = f"steps wait for data {waited:.0%} of the time, and its part of a step's takes it {1e3 * told[rank][2]:.3g} ms"
            self._tell(rank, what, with_data[rank], "look at that machine's disk and network", step, findings)
        slow = sorted({*self._named(self._slow_computing), *self._named(self._slow_with_data)})
        if slow and self._config.slow_rank != "ignore":
            findings.columns["stragglers"] = slow

    def _count(self, looks: Mapping[int, int], slowness: Mapping[int, float]) -> dict[int, int]:
        limit = self._config.straggler_factor
        return {rank: looks.get(rank, 0) + 1 for rank, factor in slowness.items() if factor > limit}

    def _named(self, looks: Mapping[int, int]) -> list[int]:
        return [rank for rank, count in looks.items() if count >= _SLOW_IN_A_ROW]

    def _named_now(self, looks: Mapping[int, int]) -> list[int]:
        return [rank for rank, count in looks.items() if count == _SLOW_IN_A_ROW]

    def _tell(self, rank: int, what: str, factor: float, advice: str, step: int, findings: Findings) -> None:
        if self._config.slow_rank == "ignore":
            return
        name = name_ranks(self._world, [rank])
        findings.warnings.append(
            f"step {step}: {name} is slow: {what}, {factor:.1f} times what it takes the others "
            f"(health.straggler_factor); {advice}"
        )
        if self._config.slow_rank == "stop":
            findings.stop = f"{name} is slow, {factor:.1f} times the others' time (health.slow_rank=stop)"


def _slowness_of_computing(paces: Sequence[tuple[float, int]]) -> dict[int, float]:
    """By rank, its time for a micro-batch over the others' median. Ranks are compared where their micro-batches are as large
    as any: a smaller one takes less time, not in proportion."""
    most_rows = max(rows for _, rows in paces)
    seconds = {rank: s for rank, (s, rows) in enumerate(paces) if rows == most_rows and s > 0}
    if len(seconds) < 2:
        return {}
    return {
        rank: own / statistics.median(s for other, s in seconds.items() if other != rank)
        for rank, own in seconds.items()
    }


def _slowness_with_data(made: Sequence[tuple[float, float]]) -> dict[int, float]:
    """By rank, its time to make its part of a step over the others' median, which is theirs in proportion where the rank has
    more samples than they, and as it is where it has fewer."""
    if len(made) < 2 or any(math.isnan(seconds) for seconds, _ in made):
        return {}
    slowness = {}
    for rank, (own, samples) in enumerate(made):
        others = [s * max(1.0, samples / max(n, 1.0)) for other, (s, n) in enumerate(made) if other != rank]
        slowness[rank] = own / max(statistics.median(others), 1e-9)
    return slowness
