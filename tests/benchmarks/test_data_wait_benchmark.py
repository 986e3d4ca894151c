"""The benchmark of waits for data runs as it is started by hand. No time of it is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data_wait.py"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_short_run_writes_its_table(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--steps", "3", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert finished.returncode == 0, finished.stderr
    rows = json.loads((tmp_path / "data_wait.json").read_text())["rows"]
    assert {row["workers"] for row in rows} == {1, 2}
    assert all(row["steps"] == 2 and 0 <= row["share"] < 1 for row in rows)
    assert all(f"| {row['what']} | {row['workers']} |" in (tmp_path / "data_wait.md").read_text() for row in rows)
