"""How long the steps of real training runs wait for their data.

    python benchmarks/data_wait.py [--steps N] [--output DIRECTORY]

Starts `lockstep train` with shipped recipes, on data of every kind, on one worker and on two, and reads `metrics.jsonl`.
Writes data_wait.json and data_wait.md. The first step of a run is left out: nothing could be made ready before it, and it
is in the account of the start. The dataset at an address is served by this machine, and its cache is empty at the start.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, measured
from launch.tracking.metrics_file import read_metrics

LOCKSTEP = str(Path(sys.executable).parent / "lockstep")
MOST_SHARE = 0.005
QUIET = [
    "tracking.wandb=off",
    "tracking.tensorboard=false",
    "schedule.warmup_steps=0",
    "evaluation.every_steps=null",
    "evaluation.samples=8",
    "evaluation.generated_tokens=0",
    "checkpoint.every_steps=100000",
]
CASES = {
    "tokens": ["gpt-stdlib"],
    "tokens, documents packed and kept apart": ["gpt-stdlib", "data.packing=best_fit", "data.separate_documents=true"],
    "tokens at an address, cache empty": ["gpt-stdlib", "data.directory={address}", "data.cache_directory={cache}"],
    "images, a small network": ["lenet-digits"],
    "images, augmented, ResNet-20": [
        "resnet-digits",
        "data.augmentation.random_resized_crop.scale=[0.5, 1.0]",
        "data.augmentation.flip=0.5",
        "data.augmentation.mixup_alpha=0.2",
    ],
}


def train(place: Path, name: str, words: list[str], workers: int, steps: int) -> list[dict[str, Any]]:
    """The steps of a run, without the first."""
    command = [
        LOCKSTEP,
        "train",
        *words,
        *QUIET,
        f"run.directory={name}",
        f"run.steps={steps}",
        "--workers",
        str(workers),
    ]
    done = subprocess.run(
        command, cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return read_metrics(place / name)[0][1:]


def measure(place: Path, steps: int) -> list[dict[str, Any]]:
    """A row for each case and number of workers."""
    rows: list[dict[str, Any]] = []
    train(place, "prepares", ["gpt-stdlib"], 1, 2)
    [prepared] = (place / "prepared").iterdir()
    with serving(prepared) as address:
        for what, words in CASES.items():
            for workers in (1, 2):
                name = f"run-{len(rows)}"
                filled = [word.format(address=address, cache=place / f"cache-{name}") for word in words]
                records = train(place, name, filled, workers, steps)
                seconds = [record["step_seconds"] for record in records]
                waits = [record["data_wait_seconds"] for record in records]
                rows.append(
                    {
                        "what": what,
                        "command": words,
                        "workers": workers,
                        "steps": len(records),
                        "step_milliseconds": 1e3 * statistics.median(seconds),
                        "wait_microseconds": 1e6 * statistics.median(waits),
                        "longest_wait_milliseconds": 1e3 * max(waits),
                        "share": sum(waits) / sum(seconds),
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address at which a folder is served over HTTP."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def as_markdown(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results for people."""
    lines = [
        "# How long steps wait for their data",
        "",
        measured(machine),
        "",
        "Rank 0 of real runs of shipped recipes, the first step of each left out. The share is that of the wait in all the",
        "time of the steps, their longest waits included; one core computes for each worker, and what makes batches ready",
        "shares these cores.",
        "",
        "| what | workers | steps | a step, ms | its wait, µs | the longest wait, ms | share | at most 0.5 % |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        verdict = "met" if row["share"] <= MOST_SHARE else "**missed**"
        lines.append(
            f"| {row['what']} | {row['workers']} | {row['steps']} | {row['step_milliseconds']:.1f} "
            f"| {row['wait_microseconds']:.0f} | {row['longest_wait_milliseconds']:.2f} | {row['share']:.3%} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints the table and writes `data_wait.json` and `data_wait.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), options.steps)
    text = as_markdown(machine, rows)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "data_wait.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (options.output / "data_wait.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
