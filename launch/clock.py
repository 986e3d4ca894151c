"""How long a worker has been in each phase since its launcher's first line: the columns that the account of a run's time is
made of. Imports no torch.

Time within an attempt is that of the monotonic clock, which all processes of a host share; the wall clock only says where
attempts lie beside each other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from distrib.phases import Moment
from launch.batch_job import batch_job

LAUNCHED = "LOCKSTEP_LAUNCHED"
"""When the work on an attempt began in its launcher: in nanoseconds of the monotonic clock."""
# What one step of training is: between them nothing else happens, and what a worker sleeps in them it waits for others.
STEP_PHASES = ("forward", "backward", "reduce", "step", "report")
_NANOSECONDS = 10**9
# A look at several times takes a few microseconds, unless it loses its core meanwhile.
_LOOK_NANOSECONDS = 50_000
_MOST_LOOKS = 3
_IMPORTED = time.monotonic_ns()
_Time = TypeVar("_Time", int, float)


def process_began(process: int | str = "self") -> int:
    """When a process of this host was started, in nanoseconds of the monotonic clock, to a hundredth of a second. Where the
    system does not tell it (macOS): when this module was imported, whichever process is asked about."""
    if not sys.platform.startswith("linux"):
        return _IMPORTED
    # The name, in brackets, may hold anything.
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[19])
    _, since_boot, now = _at_one_moment(lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    return now - (since_boot - ticks * _NANOSECONDS // os.sysconf("SC_CLK_TCK"))


def _launch_began() -> int:
    """When the launcher of this worker began, where that is known: `lockstep train` says it, and torchrun and accelerate are
    their first workers' parents. Else this process."""
    said = os.environ.pop(LAUNCHED, None)
    if said is not None:
        return int(said)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        return process_began(os.getppid() or "self")  # 0: it is in another namespace
    return process_began()


class Clock:
    """Adds up how long the thread that trains, and makes this, is in each phase: an observer of `distrib.phases`.

    It is made before the first step, and all that was until then is of the phase "start". sees_waiting: whether what the
    thread sleeps within a step is the wait for other ranks. That is so on a CPU in a world of several; a thread that
    drives a GPU sleeps because the GPU computes.
    """

    def __init__(self, *, sees_waiting: bool) -> None:
        self.launched = _launch_began()
        self._phase: str = "start"
        self._since = self.launched
        self._spent: dict[str, int] = {}
        self._sleep = _Sleep.of_this_thread() if sees_waiting else None

    def stamps(self) -> dict[str, Any]:
        """What run.json has as an attempt's `time`. Moments are the wall clock's, in seconds since 1970."""
        return {
            "launched": _wall_time_of(self.launched),
            "process_began": _wall_time_of(process_began()),
            "job": batch_job(),
            "clock": self.read(),
        }

    def hear(self, moment: Moment) -> None:
        """A phase begins. Costs a microsecond, and two more where a step begins or ends."""
        if moment.saving:
            return
        at = time.monotonic_ns()
        self._spent[self._phase] = self._spent.get(self._phase, 0) + at - self._since
        self._since = at
        self._phase = moment.phase
        if self._sleep is not None:
            self._sleep.in_step(moment.phase in STEP_PHASES)

    def read(self) -> dict[str, Any]:
        """`at`: the wall clock's time, in seconds since 1970. `phases`: seconds since the launch, by phase; their sum is the
        time since then. `waiting`: those of them within steps in which the thread slept; only where that says something."""
        _, wall, at = _at_one_moment(time.time)
        spent = self._spent | {self._phase: self._spent.get(self._phase, 0) + at - self._since}
        reading: dict[str, Any] = {
            "at": round(wall, 6),
            "phases": {phase: _seconds(nanoseconds) for phase, nanoseconds in spent.items()},
        }
        if self._sleep is not None:
            reading["waiting"] = _seconds(self._sleep.total())
        return reading


class _Sleep:
    """How long a thread slept within steps: neither ran nor waited for a core, as Linux counts it."""

    def __init__(self, schedule: int) -> None:
        self._schedule = schedule
        self._slept = 0
        self._begun: tuple[int, int] | None = None
        """When the step began, and how long the thread had not slept until then."""

    @classmethod
    def of_this_thread(cls) -> _Sleep | None:
        """None where the system does not count it: on macOS, or in a kernel without CONFIG_SCHED_INFO."""
        with contextlib.suppress(OSError):
            return cls(os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY | os.O_CLOEXEC))
        return None

    def in_step(self, within: bool) -> None:
        if within and self._begun is None:
            before, awake, _ = _at_one_moment(self._awake)
            self._begun = before, awake
        elif not within and self._begun is not None:
            self._slept, self._begun = self.total(), None

    def total(self) -> int:
        if self._begun is None:
            return self._slept
        begun, awake_until_then = self._begun
        _, awake, after = _at_one_moment(self._awake)
        return self._slept + max(0, after - begun - (awake - awake_until_then))

    def _awake(self) -> int:
        """How long the thread has not slept."""
        # The file's own time on a core is that of the last tick of the scheduler; its wait for one is exact.
        return time.thread_time_ns() + int(os.pread(self._schedule, 64, 0).split()[1])


def _wall_time_of(monotonic_nanoseconds: int) -> float:
    _, wall, now = _at_one_moment(time.time)
    return round(wall - (now - monotonic_nanoseconds) / _NANOSECONDS, 6)


def _at_one_moment(other_clock: Callable[[], _Time]) -> tuple[int, _Time, int]:
    """What another clock says, between what the monotonic one says before and after it: read again where the thread lost its
    core in between, for then they would not belong together."""
    for _ in range(_MOST_LOOKS):
        before = time.monotonic_ns()
        told = other_clock()
        after = time.monotonic_ns()
        if after - before < _LOOK_NANOSECONDS:
            break
    return before, told, after


def _seconds(nanoseconds: int) -> float:
    return nanoseconds // 1000 / 1_000_000  # to the microsecond; as exact as round() and half its time
