"""The step benchmark runs as it is started by hand, and writes what it measured. No number of it is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_quick_run_on_two_processes_writes_its_tables(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--only", "tiny", "--processes", "2", "--quick", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert finished.returncode == 0, finished.stderr

    result = json.loads((tmp_path / "step.json").read_text())
    assert result["machine"]["versions"]["torch"]
    (table,) = result["tables"]
    contenders = table["contenders"]
    assert set(contenders) == {"bare", "plain", "unwatched", "full"}
    assert table["full_over_unwatched"]["median"] > 0
    # One start of two rounds, each a block of every contender; the benchmark itself refuses unequal probe losses.
    assert all(len(contender["seconds_per_step"]) == 2 for contender in contenders.values())
    assert all(0 < contender["probe_loss"] < 10 for contender in contenders.values())

    text = (tmp_path / "step.md").read_text()
    assert table["title"] in text
    assert all(f"| `{name}` |" in text for name in contenders)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_supervision_has_a_table_of_its_own(tmp_path: Path) -> None:
    options = ["--only", "supervision", "--processes", "1", "--quick", "--output", str(tmp_path)]
    finished = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=850)
    assert finished.returncode == 0, finished.stderr
    (table,) = json.loads((tmp_path / "step-supervision.json").read_text())["tables"]
    assert set(table["contenders"]) == {"full", "supervised"}
    assert table["contenders"]["supervised"]["target"]["most"] == 1.01
    assert "ratio to full" in (tmp_path / "step-supervision.md").read_text()
