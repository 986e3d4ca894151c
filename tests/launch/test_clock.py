"""The clock of a worker: against what its thread really does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from distrib.phases import Moment
from launch.clock import LAUNCHED, Clock, process_began

TICK = 1 / os.sysconf("SC_CLK_TCK")


def hear(clock: Clock, phase: str, *, saving: bool = False) -> None:
    clock.hear(Moment(phase, 0, saving))  # type: ignore[arg-type]


def test_a_process_began_between_what_was_done_before_and_what_itself_did_first() -> None:
    script = "import time; t = time.monotonic_ns(); from launch.clock import process_began; print(process_began(), t)"
    before = time.monotonic_ns()
    began, first = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert before - TICK * 1e9 <= int(began) <= int(first)


def test_a_clock_begins_with_its_launcher_and_tells_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic_ns()
    monkeypatch.setenv(LAUNCHED, str(now - 50 * 10**9))
    clock = Clock(sees_waiting=False)
    assert LAUNCHED not in os.environ
    told = clock.stamps()
    assert told["process_began"] - told["launched"] == pytest.approx((process_began() - now) / 1e9 + 50, abs=0.1)
    assert told["clock"]["phases"].keys() == {"start"}
    assert told["clock"]["at"] - told["clock"]["phases"]["start"] == pytest.approx(told["launched"], abs=0.1)
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("other", ["clock_gettime_ns", "time"])
def test_two_clocks_are_read_again_where_the_thread_lost_its_core_between_them(
    monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    clock, expected, real = Clock(sees_waiting=False), process_began(), getattr(time, other)
    reads = 0

    def late(*given: int) -> Any:
        nonlocal reads
        reads += 1
        first = reads == 1
        time.sleep(0.2 if first else 0.0)
        told = real(*given)
        time.sleep(0.2 if first else 0.0)
        return told

    monkeypatch.setattr(time, other, late)
    if other == "clock_gettime_ns":
        assert process_began() == pytest.approx(expected, abs=1e8)
    else:
        told = clock.read()
        assert told["at"] - sum(told["phases"].values()) == pytest.approx(clock.stamps()["launched"], abs=0.1)
    assert reads > 1


def test_torchrun_is_the_launcher_of_its_first_workers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert Clock(sees_waiting=False).launched == pytest.approx(process_began(os.getppid()), abs=2e9 * TICK)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Clock(sees_waiting=False).launched == pytest.approx(process_began(), abs=2e9 * TICK)


def test_all_time_is_of_a_phase_and_none_of_two() -> None:
    clock = Clock(sees_waiting=True)
    for phase in ("load", "start", "data", "forward", "backward", "save", "data", "forward", "report", "end"):
        hear(clock, phase)
        hear(clock, "save.write", saving=True)
        before = time.monotonic_ns()
        told = sum(clock.read()["phases"].values())
        assert (before - clock.launched) / 1e9 - 1e-5 <= told <= (time.monotonic_ns() - clock.launched) / 1e9 + 1e-5
    assert "save.write" not in clock.read()["phases"]


def test_a_thread_waits_in_steps_when_it_neither_runs_nor_could() -> None:
    clock = Clock(sees_waiting=True)
    hear(clock, "data")
    time.sleep(0.05)
    assert clock.read()["waiting"] == 0.0
    hear(clock, "forward")
    hear(clock, "backward")
    time.sleep(0.05)
    assert clock.read()["waiting"] >= 0.05
    hear(clock, "data")
    waited = clock.read()["waiting"]
    time.sleep(0.05)
    assert clock.read()["waiting"] == waited >= 0.05
    assert "waiting" not in Clock(sees_waiting=False).read()


def test_a_thread_that_computes_or_waits_for_a_core_does_not_wait_for_others() -> None:
    """Beside threads of other processes that want the same core, which its own time alone would take for sleep."""
    core = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for rival in rivals:
            os.sched_setaffinity(rival.pid, core)
        os.sched_setaffinity(0, core)
        clock = Clock(sees_waiting=True)
        hear(clock, "forward")
        begun, computed = time.monotonic(), time.thread_time()
        while (own := time.thread_time() - computed) < 0.2 or time.monotonic() - begun < 2 * own:
            pass  # until the rivals have had at least as much of the core
        told = clock.read()
    finally:
        os.sched_setaffinity(0, before)
        for rival in rivals:
            rival.kill()
            rival.wait()
    assert told["waiting"] < told["phases"]["forward"] / 4
