"""What can be done with a run that has ended: evaluate it, generate from it, report on it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distrib.checkpoint import Checkpoint
from distrib.world import World
from launch import trained
from launch.attempt import format_metrics
from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import (
    LOCKSTEP,
    WORDS,
    WarmProcess,
    checkpoints,
    lockstep,
    started,
    wait_for_step,
    write_corpus,
    write_recipe,
)


@pytest.mark.parametrize("which", ["learned_gpt", "learned_lenet"])
def test_evaluate_repeats_the_evaluation_that_ended_training(
    warm: WarmProcess, which: str, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(which)
    shown = warm.lockstep("evaluate", run.name, cwd=run.parent).succeeded()
    path, metrics = shown.out.strip().split(": ", 1)
    assert path == f"{run.name}/checkpoints/{checkpoints(run)[-1]}"
    assert metrics == format_metrics(read_metrics(run)[1][-1]["evaluation"])


def test_the_commands_that_a_run_ends_with_can_be_given_to_a_shell(
    warm: WarmProcess, recipe: Path, tmp_path: Path
) -> None:
    run = "it's $(touch broken) a run"
    ended = warm.lockstep("train", recipe, "run.steps=2", f"run.directory={run}", "--workers", 1, cwd=tmp_path)
    told = ended.succeeded().err
    lines = told[told.index("next:\n") :].splitlines()[1:4]
    for line in lines:
        words = subprocess.run(
            ["bash", "-c", f'printf "%s\\n" {line.strip()}'], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert run in words
    assert not (tmp_path / "broken").exists()


def test_evaluate_takes_a_checkpoint_by_name(warm: WarmProcess, learned_lenet: Path) -> None:
    earlier = Path("lenet/checkpoints") / checkpoints(learned_lenet)[0]
    shown = warm.lockstep("evaluate", "lenet", "--checkpoint", earlier, cwd=learned_lenet.parent).succeeded()
    at_that_step = next(e for e in read_metrics(learned_lenet)[1] if e["step"] == int(earlier.name[5:]))
    assert shown.out.strip() == f"{earlier}: {format_metrics(at_that_step['evaluation'])}"


def test_evaluate_passes_over_a_damaged_checkpoint_and_says_so(
    warm: WarmProcess, learned_lenet: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(learned_lenet, tmp_path / "lenet")
    prepared = learned_lenet.parent / "prepared"
    shutil.copytree(prepared, tmp_path / "prepared")
    first, last = checkpoints(run)
    (run / "checkpoints" / last / "state.json").write_text("{}")
    shown = warm.lockstep("evaluate", "lenet", cwd=tmp_path).succeeded()
    assert f"lenet/checkpoints/{first}: " in shown.out
    assert f"passed over a checkpoint: lenet/checkpoints/{last}/state.json: " in shown.err
    (run / "checkpoints" / first / "state.json").write_text("{}")
    warm.lockstep("evaluate", "lenet", cwd=tmp_path).failed_with(78, "lenet: no good checkpoint", "state.json")


def test_the_dataset_of_a_run_is_the_one_it_was_trained_on(
    warm: WarmProcess, recipe_values: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Whatever has become of its source, and wherever the command is given."""
    texts, elsewhere = write_corpus(tmp_path / "texts"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    values = recipe_values(run={"steps": 2})
    values["data"] |= {"source": "text:texts", "directory": None}
    recipe = write_recipe(tmp_path / "own.yaml", values)
    warm.worker(recipe, "run.directory=run", cwd=tmp_path).succeeded()
    before = warm.lockstep("evaluate", tmp_path / "run", cwd=tmp_path).succeeded()
    (texts / "one-more.txt").write_text("the dogs ran " * 500)
    assert warm.lockstep("evaluate", tmp_path / "run", cwd=elsewhere).succeeded().out == before.out
    assert not list(elsewhere.iterdir())

    warm.lockstep("prepare", "text:texts", "--out", "other", cwd=tmp_path).succeeded()
    for command in ("evaluate", "generate"):
        refused = warm.lockstep(command, "run", "--dataset", "other", cwd=tmp_path)
        refused.failed_with(2, "other: not the dataset that run/checkpoints/step-00000002 was trained on", "--dataset")
    (there,) = (tmp_path / "prepared").rename(tmp_path / "moved").glob("text*")
    warm.lockstep("evaluate", "run", cwd=tmp_path).failed_with(2, "the dataset of run is not there", "--dataset")
    assert warm.lockstep("evaluate", "run", "--dataset", there, cwd=tmp_path).succeeded().out == before.out.replace(
        f"{tmp_path}/", ""
    )


def test_a_run_can_be_evaluated_while_it_trains(recipe: Path, tmp_path: Path) -> None:
    """It saves every step, and deletes what is being read."""
    arguments = ["train", recipe, "run.directory=run", "run.steps=100000", "checkpoint.every_steps=1", "--workers", 1]
    with started(LOCKSTEP, *arguments, cwd=tmp_path) as process:
        wait_for_step(tmp_path / "run", 3, None, process)
        for _ in range(3):
            assert "loss" in lockstep("evaluate", "run", cwd=tmp_path).succeeded().out
        assert process.poll() is None


def test_a_checkpoint_that_goes_while_its_files_are_listed_is_not_taken_for_one_of_another_model(
    straight_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the directory open when a live run retires it finds it emptied."""
    run = shutil.copytree(straight_run(1), tmp_path / "run")
    read = trained.load_tensors

    def read_and_retire(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], world: World) -> None:
        if checkpoint.path.name != "step-00000040":
            return read(checkpoint, tensors, world)
        checkpoint.path.rename(tmp_path / "retired")
        checkpoint.path.mkdir()
        try:
            return read(checkpoint, tensors, world)
        finally:
            checkpoint.path.rmdir()

    monkeypatch.setattr(trained, "load_tensors", read_and_retire)
    assert trained.load_trained(run, None, [], "cpu").checkpoint.path.name == "step-00000035"


def test_generate_is_a_function_of_its_seed(warm: WarmProcess, learned_gpt: Path) -> None:
    def text(*arguments: object) -> str:
        command = ("generate", "gpt", "--prompt", "the cat", "--tokens", 80, *arguments)
        return warm.lockstep(*command, cwd=learned_gpt.parent).succeeded().out

    first = text("--seed", 3)
    assert text("--seed", 3) == first
    assert text("--seed", 4) != first
    assert text("--seed", 4, "--temperature", 0) == text("--seed", 5, "--temperature", 0)
    written = re.findall(r"[a-z]+", first)[2:-1]
    assert len(written) > 5
    assert sum(word in WORDS for word in written) / len(written) > 0.7


def test_a_sample_of_text_ends_the_training(learned_gpt: Path) -> None:
    assert '"prompt": "the cat"' in (learned_gpt / "samples.jsonl").read_text()


def test_generate_needs_a_language_model(warm: WarmProcess, learned_lenet: Path) -> None:
    refused = warm.lockstep("generate", "lenet", cwd=learned_lenet.parent)
    refused.failed_with(2, "lenet: its model is no language model", "lockstep evaluate")


def test_a_report_is_one_page_that_needs_nothing_else(
    warm: WarmProcess, learned_gpt: Path, learned_lenet: Path, tmp_path: Path
) -> None:
    shown = warm.lockstep("report", learned_gpt, learned_lenet, "--out", "page.html", cwd=tmp_path).succeeded()
    assert "page.html" in shown.out
    page = (tmp_path / "page.html").read_text()
    assert "<html" in page
    assert not re.search(r"""(src|href)=["'](https?:|//|file:)""", page)
    for part in ("gpt", "lenet", "language_modelling", "lenet5"):
        assert part in page


def test_preparing_again_changes_nothing(warm: WarmProcess, dataset: Path, corpus: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in dataset.iterdir()}
    arguments = ["prepare", f"text:{corpus}", "--out", dataset, "--validation-fraction"]
    assert str(dataset) in warm.lockstep(*arguments, 0.2, cwd=dataset.parent).succeeded().out
    refused = warm.lockstep(*arguments, 0.3, cwd=dataset.parent)
    refused.failed_with(2, "prepared with data.validation_fraction 0.2, but the recipe has 0.3")
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in dataset.iterdir()} == before


def test_the_directory_holds_what_is_promised(learned_gpt: Path) -> None:
    names = {path.name for path in learned_gpt.iterdir()}
    promised = {"run.json", "recipe.yaml", "environment.json", "metrics.jsonl", "outcome.json", "checkpoints", "logs"}
    assert names >= promised
    records = read_metrics(learned_gpt)[0]
    keys = {
        "step", "attempt", "samples", "tokens", "loss", "lr", "gradient_norm", "step_seconds", "data_wait_seconds",
        "items_per_second", "mfu", "peak_memory_bytes", "skipped", "digest", "clock",
    }  # fmt: skip
    assert all(set(record) == keys for record in records)
    assert [record["step"] for record in records] == list(range(1, 151))
    assert [record["samples"] for record in records] == [16 * step for step in range(1, 151)]
    assert records[-1]["tokens"] == 150 * 16 * 64
    assert all(record["mfu"] is None for record in records)
