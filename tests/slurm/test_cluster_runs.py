"""Runs on a real cluster: under both forms of srun, through warnings, preemption and lost nodes, to the same bytes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.submit_script import PACKAGES, TEMPLATES, fill_in
from tests.end_to_end.runs import digests, final_bytes, wait_until, write_recipe
from tests.slurm.conftest import STEPS, Held, Site, attempts

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
CHECKOUT = Path(__file__).parents[2]
OWN_MODEL = """
import json
from pathlib import Path

import torch
from width_of_model import WIDTH

assert json.loads((Path(__file__).parent / "settings.json").read_text()) == {"width": WIDTH}

class Model(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.embedding = torch.nn.Embedding(shape.vocabulary_size, WIDTH)
        self.out = torch.nn.Linear(WIDTH, shape.vocabulary_size)

    def forward(self, tokens):
        return self.out(self.embedding(tokens))

def build(shape):
    return Model(shape)
"""


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_two_nodes_train_as_one_machine_does(site: Site, recipe: Path, straight_run: Path, launcher: str) -> None:
    job, run = site.submit(recipe, "--nodes", 2, "--gpus-per-node", 1, "--launcher", launcher)
    site.finish(job, run)
    assert final_bytes(run) == final_bytes(straight_run)
    assert len(site.nodes_of(job)) == 2
    assert "JOB_GRES=gpu:2" in site.cluster.run("scontrol", "--details", "show", "job", job)
    assert f"done: all {STEPS} steps are done" in site.log(run)


@pytest.mark.parametrize(("launcher", "again"), [("srun", "requeue"), ("torchrun", "chain")])
def test_a_warned_run_saves_comes_back_and_ends_in_the_same_bytes(
    site: Site, held: Held, straight_run: Path, launcher: str, again: str
) -> None:
    job, run = site.submit(held.recipe, "--nodes", 2, "--launcher", launcher, "--again", again)
    site.wait_for_step(run, 5)
    running = site.lockstep("jobs").succeeded().out.splitlines()[1]
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    site.wait_for_warning(run)
    held.let_go()
    last = site.wait_for_start(run, 2)
    site.finish(last, run)
    assert final_bytes(run) == final_bytes(straight_run)
    assert [attempt["world_size"] for attempt in attempts(run)] == [2, 2]
    # Nothing was lost: it went on from the step at which it had stopped.
    assert attempts(run)[1]["resumed_from_step"] == last_step_of(run, attempt=1)
    assert (last == job) == (again == "requeue")
    assert running.split()[:3] == [job, str(run.relative_to(site.directory)), "running"]
    ended = site.lockstep("jobs").succeeded().out.splitlines()[1]
    assert ended.split()[:4] == [last, str(run.relative_to(site.directory)), "done", f"{STEPS}/{STEPS}"]


def test_a_run_is_warned_before_its_time_limit(site: Site, recipe: Path) -> None:
    """By Slurm itself, which looks every half a minute."""
    job, run = site.submit(recipe, "run.steps=1_000_000", "--time", 5, "--warn-seconds", 295)
    assert site.wait_for_start(run, 2) == job
    wait_until(lambda: len(attempts(run)) >= 2, "the second attempt")
    assert attempts(run)[1]["resumed_from_step"] == last_step_of(run, attempt=1)
    # So soon after its beginning that the second start may have been warned as well.
    assert "warned: the run is asked to save and stop" in site.log(run)


def test_a_preempted_run_makes_room_and_comes_back(site: Site, held: Held, straight_run: Path) -> None:
    """Submitted by hand, with the lines at the top filled in by a person; and warned while its workers are only starting."""
    run = site.directory / "runs" / "mine"
    (run / "slurm").mkdir(parents=True)
    script = site.directory / "mine.sbatch"
    script.write_text(
        fill_in(
            (TEMPLATES / "train.sbatch").read_text(),
            {"gres": None, "cpus-per-task": "1", "output": "runs/mine/slurm/job-%j.out"},
            {
                "venv": sys.prefix,
                "lockstep": str(CHECKOUT),
                "recipe": str(held.recipe),
                "workers": "1",
                "run_directory": "runs/mine",
            },
        )
    )
    job = site.cluster.run("sbatch", "--parsable", f"--chdir={site.directory}", script).strip()
    site.wait_for_start(run, 1)
    nodes = ",".join(sorted(site.nodes_of(job)))
    urgent = site.cluster.run(
        "sbatch", "--parsable", "--partition=urgent", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null",
        "--wrap", "true",
    ).strip()  # fmt: skip
    site.wait_for_warning(run)
    held.let_go()
    site.cluster.wait_for_state(urgent, "COMPLETED")
    assert site.wait_for_start(run, 2) == job
    site.finish(job, run)
    assert final_bytes(run) == final_bytes(straight_run)
    assert attempts(run)[1]["resumed_from_step"] == last_step_of(run, attempt=1)


def test_a_lost_node_is_replaced(site: Site, held: Held, straight_run: Path) -> None:
    job, run = site.submit(held.recipe, "--nodes", 2)
    site.wait_for_step(run, 60)
    before = site.nodes_of(job)
    lost = max(before)
    site.cluster.kill_node(lost)
    held.let_go()
    site.wait_for_start(run, 2)
    site.finish(job, run)
    assert lost not in site.nodes_of(job)
    assert len(site.nodes_of(job)) == 2
    assert final_bytes(run) == final_bytes(straight_run)


def test_where_no_other_node_is_left_a_run_goes_on_with_fewer(site: Site, held: Held, straight_run: Path) -> None:
    """The first node of the job, too: nobody is left there to decide what comes after."""
    job, run = site.submit(held.recipe, "--nodes", "1-2", "--partition", "small")
    site.wait_for_step(run, 60)
    lost, kept = sorted(site.nodes_of(job))
    site.cluster.kill_node(lost)
    held.let_go()
    site.wait_for_start(run, 2)
    site.finish(job, run)
    assert site.nodes_of(job) == {kept}
    assert [attempt["world_size"] for attempt in attempts(run)] == [2, 1]
    assert digests(run) == digests(straight_run)


def test_a_cancelled_run_does_not_come_back(site: Site, recipe: Path) -> None:
    job, run = site.submit(recipe, "run.steps=1_000_000")
    site.wait_for_step(run, 5)
    site.cluster.run("scancel", job)
    site.cluster.wait_for_state(job, "CANCELLED")
    wait_until(lambda: not site.cluster.run("squeue", "--noheader").strip(), "the end of the job")
    assert site.cluster.state(job) == "CANCELLED"
    assert "back into the queue" not in site.log(run)
    assert "cancelled" in site.lockstep("jobs").succeeded().out


def test_a_waiting_job_does_not_see_later_edits(
    site: Site, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Lockstep itself, the recipe, and the user's own model with its data file and the module that it imports."""
    checkout = tmp_path / "checkout"
    for package in PACKAGES:
        shutil.copytree(CHECKOUT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    here = tmp_path / "here"
    model, settings, helper = here / "own" / "model.py", here / "own" / "settings.json", here / "width_of_model.py"
    model.parent.mkdir(parents=True)
    model.write_text(OWN_MODEL)
    settings.write_text('{"width": 16}')
    helper.write_text("WIDTH = 16\n")
    values = recipe_values(run={"name": "tiny", "steps": 5, "device": "cpu"})
    values["model"] = {"kind": "own.model:build"}
    recipe = write_recipe(here / "tiny.yaml", values)
    mine = Site(site.cluster, here)
    job, run = mine.submit(recipe, "--sbatch=--hold", environment={"PYTHONPATH": str(checkout)})
    for file in (checkout / "launch" / "train.py", checkout / "slurm" / "run.sh", model, settings, helper, recipe):
        file.write_text("this is not what was submitted (")
    site.cluster.run("scontrol", "release", job)
    mine.finish(job, run)
    assert len(digests(run)) == 5


def test_what_cannot_go_on_is_given_up(
    site: Site, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """78 at once; a run that only fails after as many failures as were asked for."""
    values = recipe_values(run={"name": "tiny", "steps": 5, "device": "cpu"})
    dataset = shutil.copytree(values["data"]["directory"], tmp_path / "damaged")
    values["data"]["directory"] = str(dataset)
    for shard in dataset.rglob("train*.bin"):
        shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    job, run = site.submit(write_recipe(tmp_path / "damaged.yaml", values))
    site.cluster.wait_for_state(job, "FAILED")
    assert site.cluster.job(job)["ExitCode"] == "78:0"
    assert site.log(run).count("giving up (78)") == 1

    (tmp_path / "failing.py").write_text("def build(shape):\n    raise RuntimeError('on purpose')\n")
    values = recipe_values(run={"name": "failing", "steps": 5, "device": "cpu"})
    values["model"] = {"kind": "failing:build"}
    job, run = site.submit(write_recipe(tmp_path / "failing.yaml", values), "--failures", 1)
    site.cluster.wait_for_state(job, "FAILED")
    assert site.log(run).count("on purpose") >= 2
    assert len((run / "slurm" / "jobs.txt").read_text().split()) == 2
    assert "giving up (1): 2 starts in a row have ended without a new checkpoint" in site.log(run)
    states = [line.split()[2:4] for line in site.lockstep("jobs").succeeded().out.splitlines()[1:]]
    assert states == [["given", "up"], ["failed", "RuntimeError:"]] or states[0] == ["given", "up"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the workers would see this machine's GPUs")
def test_a_wrong_recipe_is_given_up_under_torchrun_too(site: Site, recipe: Path) -> None:
    """torchrun makes a 1 of every failure; a GPU that is not real is one that no worker sees."""
    job, run = site.submit(recipe, "run.device=cuda", "--gpus-per-node", 1, "--launcher", "torchrun")
    site.cluster.wait_for_state(job, "FAILED")
    assert site.cluster.job(job)["ExitCode"] == "2:0"
    assert (run / "slurm" / "jobs.txt").read_text().split() == [job]
    assert site.log(run).count("giving up (2): run.device=cuda") == 1
    assert "refused" in site.lockstep("jobs").succeeded().out


def test_a_second_job_leaves_a_living_run_alone(site: Site, recipe: Path) -> None:
    job, run = site.submit(recipe, "run.steps=1_000_000")
    site.wait_for_step(run, 5)
    kept = [run / "slurm" / name for name in ("jobs.txt", "failures.txt", "lock")]
    before = [path.read_text() for path in kept]
    second = site.cluster.run("sbatch", "--parsable", run / "slurm" / "train.sbatch").strip()
    site.cluster.wait_for_state(second, "FAILED")
    assert site.cluster.job(second)["ExitCode"] == "2:0"
    (told,) = (run / "slurm" / f"job-{second}.out").read_text().splitlines()
    assert f"job {job} is training in {run}: nothing is changed" in told
    assert [path.read_text() for path in kept] == before
    assert not (run / "stop").exists()
    assert site.lockstep("jobs").succeeded().out.splitlines()[1].split()[:3:2] == [job, "running"]


def test_what_waits_for_a_chained_run_waits_for_its_last_link(site: Site, recipe: Path) -> None:
    """A link ends with 0 though the run is not done."""
    job, run = site.submit(recipe, "run.steps=1_000_000", "--again", "chain")
    waiting, _ = site.submit("lenet-digits", "--after", job)
    other = ("sbatch", "--parsable", "--output=/dev/null", "--wrap", "true")
    by_hand = site.cluster.run(*other[:2], f"--dependency=afterany:{job}", *other[2:]).strip()
    site.wait_for_step(run, 5)
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    last = site.wait_for_start(run, 2)
    site.cluster.wait_for_state(job, "COMPLETED")
    late, _ = site.submit("lenet-digits", "--after", job)
    told = [site.cluster.job(name)["Dependency"] for name in (waiting, by_hand, late)]
    assert told == [f"after{kind}:{last}(unfulfilled)" for kind in ("ok", "any", "ok")]
    site.cluster.run("scancel", last)
    assert [site.cluster.wait_for_state(name, "CANCELLED") for name in (waiting, late)] == ["CANCELLED"] * 2
    site.cluster.wait_for_state(by_hand, "COMPLETED")


def test_what_waits_for_a_sweep_waits_for_a_chained_row(site: Site, recipe: Path) -> None:
    job, sweep = site.submit(recipe, "run.steps=1_000_000", "--again", "chain", "--sweep", "run.seed=1,2")
    waiting, _ = site.submit("lenet-digits", "--after", job)
    site.wait_for_step(sweep / "002", 5)
    site.cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_2")
    last = site.wait_for_start(sweep / "002", 2)
    site.cluster.wait_for_state(f"{job}_2", "COMPLETED")
    told = site.cluster.job(waiting)["Dependency"].replace("(unfulfilled)", "").split(",")
    assert sorted(told) == sorted([f"afterok:{job}_*", f"afterok:{last}"])


def test_strange_names_and_an_environment_of_nothing(site: Site, recipe: Path) -> None:
    """Quotes, an expansion, and what sbatch would replace; workers that are told the environment all the same."""
    (here := site.directory / "it's 50%j $(x)").mkdir()
    job, run = Site(site.cluster, here).submit(recipe, "run.steps=5", "--sbatch=--export=NONE")
    site.finish(job, run)
    assert run.parent.parent == here
    assert "done: all 5 steps are done" in (run / "slurm" / f"job-{job}.out").read_text()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--nodes", "9"), "Requested node configuration is not available"),
        (("--gpus-per-node", "8", "run.device=cpu"), "Requested node configuration is not available"),
        (("--partition", "nowhere"), "Invalid partition name specified"),
        (("--partition", "small", "--time", "3:00:00"), "--time 3:00:00: partition small gives at most 1:00:00"),
        (("--sweep", f"run.seed={','.join(str(seed) for seed in range(20))}"), "Invalid job array specification"),
        (("--after", "999999"), "--after 999999: Slurm does not know such a job"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_with_its_reason(
    site: Site, words: tuple[str, ...], reason: str
) -> None:
    defaults = [w for name, w in (("--gpus-per-node", "0"), ("--time", "10")) if name not in words for w in (name, w)]
    site.lockstep("submit", "lenet-digits", *defaults, *words).failed_with(2, reason)
    assert not site.cluster.run("squeue", "--noheader").strip()
    assert not list(site.directory.glob("runs/*"))


def test_a_job_waits_for_another_one(site: Site) -> None:
    first = site.cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true").strip()
    job, _ = site.submit("lenet-digits", "--after", first)
    assert site.cluster.job(job)["Dependency"].startswith(f"afterok:{first}")
    site.cluster.run("scancel", first)
    site.cluster.wait_for_state(job, "CANCELLED")


def last_step_of(run: Path, attempt: int) -> int:
    # A line without its end is being written.
    lines = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"
    ]
    return max(line["step"] for line in lines if line["attempt"] == attempt)
