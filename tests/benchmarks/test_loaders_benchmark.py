"""The loaders' benchmark runs as it is started by hand, with the contenders that this environment has. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.loader_report import as_markdown, losses
from benchmarks.loaders import _tree
from benchmarks.machine import describe_machine

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loaders.py"
HERE = ("bare", "lockstep", "torch", "torch_batched")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_quick_run_writes_its_tables_and_resumes_exactly(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    finished = subprocess.run([*command, "--only", *HERE], capture_output=True, text=True, timeout=850)
    assert finished.returncode == 0, finished.stderr

    results = json.loads((tmp_path / "loaders.json").read_text())
    assert [(table["kind"], table["workers"]) for table in results["tables"]] == [
        ("tokens", 0), ("tokens", 2), ("images", 0), ("images", 2),
    ]  # fmt: skip
    for table in results["tables"]:
        rows = table["rows"]
        assert set(rows) == set(HERE if table["kind"] == "tokens" else ("lockstep", "torch"))
        for row in rows.values():
            assert "failure" not in row, row
            assert "resume_failure" not in row, row
            assert row["shape"] == ([32, 1025] if table["kind"] == "tokens" else [32, 3, 64, 64])
            assert len(row["samples_per_second"]) == 2
            assert all(speed > 0 for speed in row["samples_per_second"])
            assert row["tree_mb"] > 10
        assert rows["lockstep"]["identical"]
        assert "reread_ms" in rows["torch"]  # it keeps no state
        assert (rows["torch"]["worker_mb"] > 0) == (table["workers"] > 0)

    text = (tmp_path / "loaders.md").read_text()
    assert all(f"| `{name}` |" in text for name in HERE)


def test_a_process_is_found_though_threads_of_it_end() -> None:
    program = "import threading\nwhile True: threading.Thread(target=lambda: None).start()"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            assert [_tree(process.pid) for _ in range(1500)] == [[process.pid]] * 1500
        finally:
            process.kill()


def test_a_contender_that_fails_is_a_row_and_a_loss_without_a_reason_is_marked(tmp_path: Path) -> None:
    row = {"dtype": "torch.uint16", "first_batch_ms": 9.0, "start_seconds": 1.0, "fresh_ms": 1.0, "resume_ms": 2.0}
    row |= {"identical": True, "tree_mb": 100.0, "worker_mb": 0.0}
    rows = {
        "bare": row | {"samples_per_second": [9.0, 9.0]},
        "lockstep": row | {"samples_per_second": [4.0, 5.0]},
        "faster": row | {"samples_per_second": [6.0, 6.0], "resume_ms": 1.0, "identical": False},
        "broken": {"failure": "ImportError: no module named x", "samples_per_second": []},
    }
    table = {"kind": "tokens", "workers": 7, "rows": rows, "format_seconds": {}}
    settings = {"blocks": 1, "images": 1, "corpus": "stdlib", "rounds": 2, "block_seconds": 1}
    results = {"machine": describe_machine(), "settings": settings, "tables": [table], "versions": {}, "seconds": 1.0}
    (loss,) = losses(results)  # that `faster` resumes sooner does not count: it resumed with another batch
    assert loss.why is None
    assert "samples/s: ours 4.5; ahead: `faster` 6" in loss.text
    text = as_markdown(results)
    assert "| `broken` | failed: ImportError: no module named x |" in text
    assert "Not explained yet" in text
