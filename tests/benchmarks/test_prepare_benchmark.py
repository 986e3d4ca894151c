"""The benchmark of preparation runs as it is started by hand, and writes what it measured. No number of it is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "prepare.py"
CONTENDERS = {"encode_batch", "encode_batch_fast", "prepare"}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_small_run_writes_its_table(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--megabytes", "3", "--rounds", "1", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert finished.returncode == 0, finished.stderr
    results = json.loads((tmp_path / "prepare.json").read_text())
    assert set(results["seconds"]) == set(results["cpu_seconds"]) == CONTENDERS
    assert results["text_bytes"] >= 3e6
    assert results["tokens"] > 0  # the benchmark itself refuses contenders that do not make the same
    assert (tmp_path / "prepare.md").read_text() in finished.stdout
