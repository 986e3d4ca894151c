"""Arrays on a real cluster: a sweep whose rows are runs, and a dataset that is prepared in parts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launch.submit_script import TEMPLATES, fill_in
from tests.end_to_end.runs import lockstep, wait_until, write_corpus
from tests.slurm.conftest import Site

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_a_sweep_trains_every_row_and_skips_what_is_done(site: Site, recipe: Path) -> None:
    job, sweep = site.submit(recipe, "run.steps=5", "--sweep", "optimizer.lr=1e-3,2e-3", "--at-once", 2)
    for row in (1, 2):
        site.cluster.wait_for_state(f"{job}_{row}", "COMPLETED", "FAILED")
    assert [json.loads((sweep / row / "outcome.json").read_text())["exit_code"] for row in ("001", "002")] == [0, 0]
    rates = [(sweep / row / "recipe.yaml").read_text().count("lr: 0.002") for row in ("001", "002")]
    assert rates == [0, 1]
    lines = site.lockstep("jobs").succeeded().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [f"{job}_1", f"{job}_2"]
    assert [line.split()[2:4] for line in lines] == [["done", "5/5"], ["done", "5/5"]]

    # One row is lost; the same script again trains that one alone.
    (sweep / "002" / "outcome.json").unlink()
    again = site.cluster.run("sbatch", "--parsable", sweep / "slurm" / "sweep.sbatch").strip()
    for row in (1, 2):
        site.cluster.wait_for_state(f"{again}_{row}", "COMPLETED", "FAILED")
    logs = [(sweep / "slurm" / f"job-{again}_{row}.out").read_text() for row in (1, 2)]
    assert ["is done already" in log for log in logs] == [True, False]
    assert json.loads((sweep / "002" / "outcome.json").read_text())["exit_code"] == 0


def test_a_dataset_is_prepared_in_parts_and_put_together(site: Site) -> None:
    corpus, out = write_corpus(site.directory / "texts", documents=20), site.directory / "prepared"
    template = (TEMPLATES / "prepare.sbatch").read_text()
    script = site.directory / "prepare.sbatch"
    script.write_text(
        fill_in(
            template,
            {"array": "1-2", "cpus-per-task": "1", "output": str(site.directory / "job-%A_%a.out")},
            {
                "venv": sys.prefix,
                "lockstep": str(TEMPLATES.parent),
                "sources": [f"text:{corpus}"],
                "out": str(out),
                "parts": "2",
                "options": ["--tokenizer", "bytes"],
            },
        )
    )
    job = site.cluster.run("sbatch", "--parsable", script).strip()
    wait_until((out / "manifest.json").exists, "the whole dataset")
    assert site.cluster.job(f"{job}_1")["JobState"] == "COMPLETED"
    alone = site.directory / "alone"
    lockstep("prepare", f"text:{corpus}", "--out", alone, "--workers", 1, cwd=site.directory).succeeded()
    assert (out / "manifest.json").read_bytes() == (alone / "manifest.json").read_bytes()
