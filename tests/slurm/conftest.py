"""A real cluster for the session, the tiny recipe, and a run of it that nothing has interrupted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import (
    Result,
    command,
    lockstep,
    read_metrics,
    tiny_gpt,
    wait_until,
    write_corpus,
    write_recipe,
)
from tests.slurm.cluster import Cluster, why_not

# Enough of them for a request to stop to come in between.
STEPS = 400
# The transformer of the recipe, which from some step on waits until it is let go.
HELD_MODEL = """
import time
from pathlib import Path

from models.build import build_model
from models.config import TransformerConfig

def build(shape, forwards, gate, **options):
    model = build_model(TransformerConfig(kind="transformer", **options), shape)
    done = 0

    def wait(module, _):
        nonlocal done
        done += module.training
        while done > forwards and not Path(gate).exists():
            time.sleep(0.05)

    model.register_forward_pre_hook(wait)
    return model
"""
INSTALL = Path(__file__).with_name("install.sh")


@dataclass
class Site:
    """The cluster as somebody uses it who stands in a directory of their own."""

    cluster: Cluster
    directory: Path

    def lockstep(self, *arguments: object, environment: Mapping[str, str] | None = None) -> Result:
        env = {**self.cluster.environment, **(environment or {})}
        return command(sys.executable, "-m", "launch.cli", *arguments, cwd=self.directory, env=env)

    def submit(self, *arguments: object, environment: Mapping[str, str] | None = None) -> tuple[str, Path]:
        """Submits for CPUs alone, unless said otherwise: the job, and the directory of its run."""
        words = [str(argument) for argument in arguments]
        if "--gpus-per-node" not in words:
            words += ["--gpus-per-node", "0"]
        if "--time" not in words:
            words += ["--time", "10"]
        told = self.lockstep("submit", *words, environment=environment).succeeded().out
        run = re.search(r"^(?:run        |sweep .* in )(.*)$", told, re.MULTILINE)
        job = re.search(r"^submitted  job (\d+)$", told, re.MULTILINE)
        assert run is not None, told
        assert job is not None, told
        return job[1], Path(run[1])

    def log(self, run: Path) -> str:
        """Everything that the jobs of a run have written."""
        return "\n".join(path.read_text() for path in sorted((run / "slurm").glob("job-*.out")))

    def wait_for_step(self, run: Path, step: int) -> None:
        def reached() -> bool:
            time.sleep(0.05)
            assert "giving up" not in (log := self.log(run)), log
            return any(record["step"] >= step for record in read_metrics(run)[0])

        wait_until(reached, f"step {step} of {run}")

    def wait_for_start(self, run: Path, number: int) -> str:
        """Waits until a run is taken up for the `number`th time; the job that has taken it up."""
        starts = run / "slurm" / "jobs.txt"

        def started() -> bool:
            time.sleep(0.05)
            assert "giving up" not in (log := self.log(run)), log
            return starts.exists() and len(starts.read_text().split()) >= number

        wait_until(started, f"start {number} of {run}: {self.log(run)}")
        return starts.read_text().split()[number - 1]

    def nodes_of(self, job: str) -> set[str]:
        """On which nodes a job runs, or ran last."""
        return set(self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(job)["NodeList"]).split())

    def wait_for_warning(self, run: Path) -> None:
        """Waits until a job has asked its run to stop."""
        wait_until(lambda: "warned: the run is asked to save and stop" in self.log(run), f"a request to stop {run}")

    def finish(self, job: str, run: Path) -> None:
        """Waits until the job has ended well."""
        state = self.cluster.wait_for_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert state == "COMPLETED", self.log(run)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why_not() is not None and os.geteuid() == 0:
        subprocess.run([INSTALL], check=False, capture_output=True)
    if reason := why_not():
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    """An idle cluster; at the end no job of the test is left, and every node is back."""
    yield Site(cluster, tmp_path)
    cluster.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
    cluster.run("scancel", "--user=root", check=False)
    cluster.wait_until_idle()


@pytest.fixture(scope="session")
def recipe_values(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """The tiny recipe on a dataset that is prepared; `sections` change or add keys."""
    directory = tmp_path_factory.mktemp("data")
    corpus, dataset = write_corpus(directory / "texts"), directory / "prepared"
    lockstep(
        "prepare", f"text:{corpus}", "--out", dataset, "--validation-fraction", 0.2, "--workers", 1, cwd=directory
    ).succeeded()

    def make(**sections: Any) -> dict[str, Any]:
        longer = {
            "run": {"name": "tiny", "steps": STEPS, "device": "cpu"},
            "batch": {"global_samples": 4, "micro_samples": 2},
            "checkpoint": {"every_steps": 50},
        }
        return tiny_gpt(dataset, corpus, **{**longer, **sections})

    return make


@pytest.fixture(scope="session")
def recipe(recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", recipe_values())


@dataclass
class Held:
    """The recipe as `recipe` has it, but for a run that goes no further than some steps beyond the 60th until it is let go:
    whatever is to happen to it before its end does, however long that takes."""

    recipe: Path
    gate: Path

    def let_go(self) -> None:
        self.gate.touch()


@pytest.fixture
def held(recipe_values: Callable[..., dict[str, Any]], site: Site) -> Held:
    (site.directory / "held.py").write_text(HELD_MODEL)
    values, gate = recipe_values(), site.directory / "gate"
    options = {key: value for key, value in values["model"].items() if key != "kind"}
    values["model"] = {"kind": "held:build", "options": {**options, "forwards": 70, "gate": str(gate)}}
    return Held(write_recipe(site.directory / "held.yaml", values), gate)


@pytest.fixture(scope="session")
def straight_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's run by two workers, far from any cluster."""
    path = tmp_path_factory.mktemp("straight") / "run"
    lockstep("train", recipe, f"run.directory={path}", "--workers", 2, cwd=path.parent).succeeded()
    return path


def attempts(run: Path) -> list[dict[str, Any]]:
    """The attempts that a run has begun, as run.json has them."""
    path = run / "run.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["attempts"] if path.exists() else []
    return found
