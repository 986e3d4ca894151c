"""The packing benchmark runs as it is started by hand. No time of it is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "packing.py"


def test_a_small_run_writes_its_table(tmp_path: Path) -> None:
    sizes = ["--rounds", "1", "--characters", "600000", "--documents", "1000"]
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, "--output", str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads((tmp_path / "packing.json").read_text())
    assert len(result["microseconds_per_sample"]) == 4
    assert result["share_of_documents_cut"]["best_fit"] == 0
    assert result["share_of_documents_cut"]["concatenate"] > 0.1
    unused = result["share_of_inputs_without_target"]
    assert unused["best fit"] == pytest.approx(unused["best fit, documents apart"])
    assert "| best fit, documents apart |" in (tmp_path / "packing.md").read_text()
