"""What goes wrong outside of the program: one clear line (what, where, what to do), the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import (
    LOCKSTEP,
    WarmProcess,
    checkpoints,
    environment,
    final_bytes,
    history,
    lockstep,
    srun_variables,
    started,
    wait_for_step,
    write_recipe,
)
from tests.end_to_end.user_models import write_user_package

# What torchrun, with one node, sets for the first of its two workers.
TORCHRUN = {
    "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip


@pytest.fixture
def own_dataset(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "own-dataset")


@pytest.fixture
def run(straight_run: Callable[..., Path], tmp_path: Path) -> Path:
    """The test's own copy of a finished run of 40 steps."""
    return shutil.copytree(straight_run(1), tmp_path / "run")


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("text:missing", ["source missing", "no such file"]),
        ("text:empty", ["source text:empty", "no documents", "correct data.source"]),
        ("text:one", ["source text:one", "no documents for", "validation_fraction"]),
        ("jsonl:broken.jsonl#text", ["broken.jsonl:2", "not JSON"]),
        ("jsonl:broken.jsonl#body", ["broken.jsonl:1", "'body'"]),
        ("text:binary", ["not UTF-8 at byte 1"]),
        ("images:empty", ["source empty", "no images in sub-folders"]),
    ],
)
def test_a_source_that_cannot_be_prepared(source: str, parts: list[str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").touch()
    if source.startswith("images"):
        (tmp_path / "empty" / "nothing.txt").unlink()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "text.txt").write_text("a single document")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "text.txt").write_bytes(b"a\xff")
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    overrides = [f"data.source={source}", "data.directory=made", "run.directory=run", "data.sequence_tokens=256"]
    ended = lockstep("train", recipe, *overrides, cwd=tmp_path)
    ended.failed_with(2, *parts)
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "run").exists()


def test_an_altered_shard_stops_the_run_and_is_named(own_dataset: Path, recipe: Path, tmp_path: Path) -> None:
    """The byte lies where only the training split reads it: the run finds it while it trains."""
    shard = next(own_dataset.glob("train-*.bin"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    ended = lockstep(
        "train", recipe, f"data.directory={own_dataset}", "run.directory=run", "--workers", 2, cwd=tmp_path
    )
    assert ended.code == 78
    assert "Traceback" not in ended.err
    assert all(f"{shard}: block 0" in line and "was altered" in line for line in ended.told)
    assert ended.told
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit_code"] == 78
    assert str(shard) in outcome["reason"]


@pytest.mark.parametrize("change", ["truncated", "missing", "altered manifest"])
def test_a_damaged_dataset_is_named_before_training(
    warm: WarmProcess, change: str, own_dataset: Path, recipe: Path, tmp_path: Path
) -> None:
    shard = next(own_dataset.glob("train-*.bin"))
    match change:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-2])
            parts = [str(shard), "2 bytes short of the manifest's"]
        case "missing":
            shard.unlink()
            parts = [str(shard), "missing"]
        case "altered manifest":
            manifest = own_dataset / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"documents": ', '"documents": 1', 1))
            parts = [str(manifest), "altered or damaged"]
    ended = warm.worker(recipe, f"data.directory={own_dataset}", "run.directory=run", cwd=tmp_path)
    ended.failed_with(78, *parts, "restore the file")


def test_a_dataset_of_a_newer_version_is_left_alone(
    warm: WarmProcess, own_dataset: Path, recipe: Path, tmp_path: Path
) -> None:
    manifest = own_dataset / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 3'))
    before = files_of(own_dataset)
    ended = warm.worker(recipe, f"data.directory={own_dataset}", "run.directory=run", cwd=tmp_path)
    ended.failed_with(2, str(manifest), "format_version 3 is newer", "update Lockstep")
    assert files_of(own_dataset) == before


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.vocabulary_size=100"], ["model.vocabulary_size 100 is smaller than the data's 257"]),
        (["data.sequence_tokens=100000"], ["data.sequence_tokens 100000 is longer than the train data"]),
        (["model.context_tokens=32"], ["model.context_tokens 32 is shorter than data.sequence_tokens 64"]),
        (["task.kind=classification"], ["task.kind classification needs labelled data"]),
        (["model={kind: lenet5}"], ["override 'model={kind: lenet5}'"]),
    ],
)
def test_a_model_that_does_not_fit_the_data(
    warm: WarmProcess, overrides: list[str], parts: list[str], recipe: Path, tmp_path: Path
) -> None:
    ended = warm.worker(recipe, *overrides, "run.directory=run", cwd=tmp_path)
    ended.failed_with(2, *parts)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_task_that_does_not_fit_the_data(warm: WarmProcess, tmp_path: Path) -> None:
    arguments = ["lenet-digits", "task.kind=language_modelling", "run.directory=run"]
    warm.worker(*arguments, cwd=tmp_path).failed_with(2, "task.kind language_modelling needs text")
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    ended = warm.worker(recipe, "run.directory=file/run", cwd=tmp_path)
    ended.failed_with(2, "run directory", "file", "cannot be written", "set run.directory")
    assert (tmp_path / "file").read_text() == "no directory"


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_no_room_for_a_checkpoint(
    warm: WarmProcess, run: Path, recipe: Path, straight_run: Callable[..., Path], asynchronous: str
) -> None:
    """Files may not grow beyond 100 kB, as on a full disk: training goes on, is told, and ends with 78."""
    arguments = [recipe, f"run.directory={run}", "--resume", "auto"]
    arguments += ["run.steps=47", "--allow-change", f"checkpoint.asynchronous={asynchronous}"]
    ended = warm.worker(*arguments, cwd=run.parent, limits={resource.RLIMIT_FSIZE: 100_000})
    ended.failed_with(78, "after step 47", "no room for a checkpoint", "earlier checkpoints are intact")
    assert "checkpoint of step 45 not saved" in ended.err
    assert final_bytes(run) == final_bytes(straight_run(1))
    assert len(history(run)) == 47
    assert not list((run / "checkpoints").glob(".tmp-*"))
    warm.worker(*arguments, cwd=run.parent).succeeded()
    assert checkpoints(run)[-1] == "step-00000047"


def test_no_room_for_metrics(warm: WarmProcess, run: Path, recipe: Path, straight_run: Callable[..., Path]) -> None:
    size = (run / "metrics.jsonl").stat().st_size
    arguments = [recipe, f"run.directory={run}", "--resume", "auto"]
    arguments += ["run.steps=60", "--allow-change", "checkpoint.every_steps=null", "evaluation.samples=8"]
    ended = warm.worker(*arguments, cwd=run.parent, limits={resource.RLIMIT_FSIZE: size + 1000})
    ended.failed_with(78, "metrics.jsonl: cannot be written", "free some space and resume")
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 78
    assert final_bytes(run) == final_bytes(straight_run(1))
    warm.worker(*arguments, cwd=run.parent).succeeded()
    assert [record["step"] for record in read_metrics(run)[0]] == list(range(1, 61))


def test_no_room_for_a_new_run(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    """Metrics and log lie on a device that is always full: one line each, and the right exit code."""
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank-0.log").symlink_to("/dev/full")
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    ended = warm.worker(recipe, "run.directory=run", cwd=tmp_path)
    assert ended.code == 78, ended.err
    assert "Traceback" not in ended.err
    warning, error = ended.told
    assert warning.startswith("lockstep: warning: ")
    assert "rank-0.log: cannot be written (No space left on device)" in warning
    assert error.startswith("lockstep: error: run/metrics.jsonl: cannot be written (No space left on device)")


def test_a_directory_that_already_holds_a_run(run: Path, recipe: Path) -> None:
    before = files_of(run)
    ended = lockstep("train", recipe, f"run.directory={run}", cwd=run.parent)
    ended.failed_with(2, f"run.directory={run}: already holds a run", "--resume auto")
    assert files_of(run) == before


def test_two_processes_cannot_share_a_run(recipe: Path, tmp_path: Path) -> None:
    arguments = ["train", recipe, "run.directory=run", "run.steps=100000", "--resume", "auto", "--workers", 1]
    with started(LOCKSTEP, *arguments, cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 1, None, process)
        second = lockstep(*arguments, cwd=tmp_path)
        second.failed_with(2, "run directory run: another process is training in it")
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["exit_code"] == 75


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"RANK": "0"}, ["half set: RANK without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "unset them all"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["without MASTER_ADDR, MASTER_PORT"]),
        (
            {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ["WORLD_SIZE='two'"],
        ),
        (
            srun_variables([2, 2], 7)[3] | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            ["half set", "MASTER_ADDR"],
        ),
        (srun_variables([2, 2], 7)[3] | {"SLURM_STEP_NUM_TASKS": "3"}, ["SLURM_PROCID=3 is not below"]),
        (
            srun_variables([2, 2], 7)[3] | TORCHRUN,
            ["two launchers contradict each other: torchrun knows of one node", "task 3 of 4 of Slurm's step 7.0"],
        ),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, ["SLURM_NTASKS=2, but srun did not start"]),
    ],
)
def test_launcher_variables_that_contradict_each_other(
    warm: WarmProcess, variables: dict[str, str], parts: list[str], recipe: Path, tmp_path: Path
) -> None:
    ended = warm.worker(recipe, "run.directory=run", cwd=tmp_path, env=environment(**variables))
    ended.failed_with(2, *parts)
    assert not (tmp_path / "run").exists()


def test_a_local_rank_that_contradicts_the_launcher_s(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    arguments = ["--local_rank=1", recipe, "run.directory=run"]
    ended = warm.worker(*arguments, cwd=tmp_path, env=environment(**TORCHRUN))
    ended.failed_with(2, "--local_rank=1 contradicts local rank 0, which torchrun gave")


def test_workers_are_started_by_one_launcher(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    for variables, launcher in ((srun_variables([2], 7)[1], "srun"), (TORCHRUN, "torchrun")):
        ended = warm.lockstep("train", recipe, "run.directory=run", cwd=tmp_path, env=environment(**variables))
        ended.failed_with(2, f"{launcher} has started 2 of it; start `python -m launch.train` in its place")
    assert not (tmp_path / "run").exists()


def test_a_meeting_point_that_is_taken(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ended = warm.worker(recipe, "run.directory=run", cwd=tmp_path, env=environment(**variables))
    ended.failed_with(1, f"port {port}, at which the workers were to meet", f"is in use by process {os.getpid()} (")


def test_a_meeting_point_that_nobody_knows(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    """The name of a node that is none of a host; the others would look for it until the timeout."""
    task = srun_variables([1, 1], 7)[1] | {"SLURM_STEP_NODELIST": "no-such-host.invalid,n2"}
    ended = warm.worker(recipe, "run.directory=run", cwd=tmp_path, env=environment(**task))
    ended.failed_with(1, "rank 1 of 2 does not know no-such-host.invalid", "set MASTER_ADDR")


def test_workers_that_never_come(warm: WarmProcess, recipe: Path, tmp_path: Path) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    arguments = [recipe, "run.directory=run", "parallel.timeout_seconds=1"]
    ended = warm.worker(*arguments, cwd=tmp_path, env=environment(**variables))
    ended.failed_with(1, "rank 1 of 2 could not meet the others at 127.0.0.1:1")


@pytest.mark.parametrize("model", ["build_hungry", "build_hungry_for_many"])
def test_out_of_memory(
    warm: WarmProcess, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path, model: str
) -> None:
    """In the dry run, which is a small one on a CPU, or in the first forward passes after it."""
    values = recipe_values(batch={"global_samples": 4, "micro_samples": 4})
    values["model"] = {"kind": f"own_package.models_of_mine:{model}"}
    recipe = write_recipe(tmp_path / "hungry.yaml", values)
    folder = write_user_package(tmp_path / "mine")
    ended = warm.worker(recipe, "run.directory=run", cwd=tmp_path, env=environment(PYTHONPATH=str(folder)))
    ended.failed_with(78, "out of memory", "you tried to allocate", "lower batch.micro_samples")
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (78, 0)
