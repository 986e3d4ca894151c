"""`make chaos SEEDS=100`: so many cases one after the other, and a table of what became of each.

    python -m tests.chaos.campaign --seeds 100 [--first 0] [--out benchmarks/results/chaos]

A case that ends as its fault says is a line of the table; one that does not is told whole on stderr, and the exit code is 1.
Workers are forked from a process that has imported what they import (warm_launcher.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from tests.chaos.harness import Ground, run_case
from tests.chaos.launching import WarmLauncher
from tests.chaos.plan import NOT_DRAWN, SAVE_EVERY_STEPS, STEPS, WORLD_SIZE, case_of_seed

COLUMNS = ("seed", "fault", "phase", "step", "rank", "restarts", "exit codes", "recovery seconds", "outcome")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.campaign", description=__doc__)
    parser.add_argument("--seeds", type=int, required=True, help="how many cases")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args(argv)
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    first = f" FIRST={arguments.first}" if arguments.first else ""
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    results = {
        "command": f"make chaos SEEDS={arguments.seeds}{first}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
        "asked": arguments.seeds,
        "rows": rows,
    }
    launcher = WarmLauncher()
    try:
        with tempfile.TemporaryDirectory(prefix="lockstep-chaos-") as folder:
            ground = Ground(Path(folder), launcher)
            for seed in seeds:
                rows.append(_row(ground, seed, Path(folder) / f"seed-{seed}"))
                if arguments.out is not None:  # each time: a campaign may be interrupted
                    results["seconds"] = round(time.monotonic() - begun, 1)
                    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
                    arguments.out.with_suffix(".md").write_text(as_page(results))
    finally:
        launcher.close()
    failed = [row for row in rows if row["outcome"] == "FAILED"]
    print(f"{len(rows) - len(failed)} of {len(rows)} seeds ended as they must", flush=True)
    return 1 if failed else 0


def _row(ground: Ground, seed: int, directory: Path) -> dict[str, Any]:
    case = case_of_seed(seed, directory)
    what = case.happenings[case.main]
    row: dict[str, Any] = {"seed": seed, "fault": case.fault, "phase": what.phase, "step": what.step, "rank": what.rank}
    try:
        told = run_case(ground, directory, case)
    except AssertionError as error:
        print(f"seed {seed}: {error}", file=sys.stderr, flush=True)
        row |= {"restarts": None, "exit codes": None, "recovery seconds": None, "outcome": "FAILED", "seconds": None}
    else:
        recovery = None if told.recovery_seconds is None else round(told.recovery_seconds, 2)
        outcome = case.outcome if told.happened else "its moment never came; identical"
        codes = ", ".join(map(str, told.exit_codes))
        row |= {"restarts": told.restarts, "exit codes": codes, "recovery seconds": recovery, "outcome": outcome}
        row |= {"seconds": round(told.seconds, 1)}
    print(_line(row), flush=True)
    return row


def _line(row: dict[str, Any]) -> str:
    cells = ["" if row[column] is None else row[column] for column in COLUMNS]
    if row["rank"] is None:
        cells[COLUMNS.index("rank")] = "all"
    return f"| {' | '.join(map(str, cells))} |"


def as_page(results: dict[str, Any]) -> str:
    rows = results["rows"]
    by_fault: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_fault.setdefault(row["fault"], []).append(row)
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    good = sum(row["outcome"] != "FAILED" for row in rows)
    cut_short = " The campaign was interrupted there." if len(rows) < results["asked"] else ""
    summary = ["| fault | seeds | ended as they must | median recovery, seconds |", "|---|---:|---:|---:|"]
    for fault in sorted(by_fault):
        here = by_fault[fault]
        seconds = [row["recovery seconds"] for row in here if row["recovery seconds"] is not None]
        shown = f"{median(seconds):.2f}" if seconds else ""
        ended = sum(row["outcome"] != "FAILED" for row in here)
        summary.append(f"| {fault} | {len(here)} | {ended} | {shown} |")
    table = [f"| {' | '.join(COLUMNS)} |", "|---:|---|---|---:|---:|---:|---|---:|---|", *map(_line, rows)]
    return f"""# Faults on purpose

`{results["command"]}`, {results["date"]}, {results["device"]}, {versions};
{len(rows)} seeds in {results["seconds"]:.0f} s, {good} of them ended as they must.{cut_short}

Every case is a run of {STEPS} steps on {WORLD_SIZE} workers with a checkpoint every {SAVE_EVERY_STEPS} steps and
dropout, on a CPU. The seed says what goes wrong, and in which phase, after how many steps and in which rank.
`identical`: after restarts the weights, the optimizer and every line of every step are those of the undisturbed run,
byte by byte, `lockstep data audit` proves the samples, and no process and no temporary file is left.
`skipped`: the step is, on all ranks, nothing else is, and it is said. `78, then identical`: the run ends with 78,
all that it had published verifies, and once what was broken is mended the same command ends as identical.
The exit codes are those of the command each time that it was started, negative for a signal. A rank that is asked to stop by
SIGTERM or USR1 must end the command with 75, everything saved, in the attempt that it came in; or, in the last steps, with 0.
The recovery is from the fault to the end of the first step after it; workers are forked from a process that has
imported what they import, so the seconds of their imports are not in it, but where the dataset is remote.
Not drawn, because it waits for half a minute: {", ".join(NOT_DRAWN)}; `tests/chaos/test_chaos.py` holds it.

{chr(10).join(summary)}

{chr(10).join(table)}
"""


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
