"""A preparation that is asked to stop, as a cluster asks: its processes all at once, and by SIGTERM or SIGUSR1."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.end_to_end.runs import LOCKSTEP, lockstep, started, wait_until


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preparation_that_is_asked_to_stop_ends_as_by_ctrl_c_and_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    words = ["prepare", "stdlib", "--out", "made", "--workers", 2]
    with started(LOCKSTEP, *words, cwd=tmp_path) as process:
        wait_until(lambda: any(tmp_path.glob(".made.preparing/*/units/*.json")), "a finished unit")
        workers = children_of(process.pid)
        assert len(workers) == 2
        for pid in [*workers, process.pid]:
            os.kill(pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert err == "lockstep: interrupted; what was finished is intact\n"
    assert "made: going on; " in lockstep(*words, cwd=tmp_path).succeeded().out
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
