"""A preparation that is asked to stop, as a cluster asks: its processes all at once, and by SIGTERM or SIGUSR1."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from collections.abc import Iterator
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


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Whoever opens the file meanwhile waits for it: what needs it does not end before it was asked to stop."""
    with path.open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # tells that somebody waits, and is ignored
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preparation_that_is_asked_to_stop_ends_as_by_ctrl_c_and_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "texts").mkdir()
    files = [tmp_path / "texts" / f"{number}.txt" for number in range(4)]
    for path in files:
        path.write_text(f"the cat sat on mat {path.stem}\n" * 80_000)  # a unit of work each
    words = ["prepare", "text:texts", "--out", "made", "--workers", 2, "--validation-fraction", 0.5]
    with held(files[-1]), started(LOCKSTEP, *words, cwd=tmp_path) as process:
        wait_until(lambda: any(tmp_path.glob(".made.preparing/*/units/*.json")), "a finished unit")
        workers = children_of(process.pid)
        assert len(workers) == 2
        for pid in [*workers, process.pid]:
            os.kill(pid, number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert err == "lockstep: interrupted; what was finished is intact\n"
    assert "made: going on; " in lockstep(*words, cwd=tmp_path).succeeded().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "texts"]
