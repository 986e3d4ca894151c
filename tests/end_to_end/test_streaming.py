"""A run that reads a `datasets` stream as it comes: told what that costs, killed and resumed, evaluated, refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.tracking.metrics_file import read_metrics
from tests.data.streamed_helpers import write_source
from tests.end_to_end.runs import (
    LOCKSTEP,
    WORDS,
    WarmProcess,
    checkpoints,
    digests,
    final_bytes,
    history,
    lockstep,
    losses,
    started,
    tiny_gpt,
    wait_for_step,
    wait_until,
    workers_of,
    write_recipe,
)

STEPS = 30


@pytest.fixture(scope="module")
def streamed_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of some twenty short documents: a run reads a few epochs of them."""
    folder = tmp_path_factory.mktemp("streamed") / "texts"
    folder.mkdir()
    choose = random.Random(3)
    for shard in range(4):
        texts = [" ".join(choose.choice(WORDS) for _ in range(60)) for _ in range(18 + shard)]
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def streamed(streamed_source: Path) -> Callable[..., Path]:
    """The tiny recipe over that source, with dropout; keyword arguments change its data section."""

    def make(name: str, **changes: Any) -> Path:
        values = tiny_gpt(Path(), Path(), run={"steps": STEPS}, checkpoint={"every_steps": 3})
        values["data"] = {
            "source": f"hf:{streamed_source}",
            "streaming": True,
            "sequence_tokens": 64,
            "validation_fraction": 0.2,
            **changes,
        }
        return write_recipe(streamed_source.parent / f"{name}.yaml", values)

    return make


@pytest.fixture(scope="module")
def recipe(streamed: Callable[..., Path]) -> Path:
    return streamed("two", streaming_parts=2, shuffle_buffer_samples=7)


@pytest.fixture(scope="module")
def alone(recipe: Path, warm: WarmProcess) -> Path:
    """Two parts read by one worker, never interrupted."""
    run = recipe.parent / "alone"
    warm.worker(recipe, f"run.directory={run}", cwd=run.parent).succeeded()
    return run


def parts_at_end(run: Path) -> list[dict[str, Any]]:
    """Where the parts stand in the last checkpoint, but for the words in which `datasets` says it."""
    state = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    return [{key: value for key, value in part.items() if key != "source"} for part in state["parts"]]


def test_what_a_stream_costs_is_told_once_and_the_rest_is_kept(
    recipe: Path, alone: Path, tmp_path: Path, warm: WarmProcess
) -> None:
    again = warm.worker(recipe, f"run.directory={tmp_path / 'again'}", cwd=tmp_path).succeeded()
    assert history(tmp_path / "again") == history(alone)
    assert final_bytes(tmp_path / "again") == final_bytes(alone)
    for words in ("is read as it comes, in 2 parts", "not promised: how many samples and epochs", "7 together"):
        assert again.err.count(words) == 1
    assert {part["epoch"] for part in parts_at_end(alone)} <= {1, 2, 3}
    assert not (tmp_path / "prepared").exists()


def test_two_workers_read_what_one_reads(recipe: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "two"
    result = lockstep("train", recipe, f"run.directory={run}", "--workers", 2, cwd=tmp_path).succeeded()
    assert (result.out + result.err).count("is read as it comes") == 1
    assert digests(run) == digests(alone)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    assert parts_at_end(run) == parts_at_end(alone)


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("shuffle", [0, 7])
def test_a_killed_run_ends_in_the_same_bytes(
    world_size: int, shuffle: int, streamed: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = streamed(f"killed-{world_size}-{shuffle}", shuffle_buffer_samples=shuffle)
    straight, run = tmp_path / "straight", tmp_path / "killed"
    arguments = ["train", recipe, "--workers", world_size]
    lockstep(*arguments, f"run.directory={straight}", cwd=tmp_path).succeeded()
    choose = random.Random(world_size + shuffle)
    for attempt, step in enumerate(sorted(choose.sample(range(4, STEPS - 4), 2)), start=1):
        arguments = ["train", recipe, "--workers", world_size, f"run.directory={run}", "--resume", "auto"]
        with started(LOCKSTEP, *arguments, cwd=tmp_path) as process:
            wait_for_step(run, step, attempt, process)
            # A step is recorded before the checkpoint that was begun at it is published.
            wait_until(lambda: bool(checkpoints(run)) or process.poll() is not None, f"a checkpoint of {run}")
            for pid in [process.pid, *workers_of(process.pid)]:
                with contextlib.suppress(ProcessLookupError):  # workers go with their supervisor
                    os.kill(pid, signal.SIGKILL)
    resumed = lockstep(*arguments, cwd=tmp_path).succeeded()
    assert "resumed from step" in resumed.out + resumed.err
    assert history(run) == history(straight)
    assert final_bytes(run) == final_bytes(straight)
    assert parts_at_end(run) == parts_at_end(straight)


@pytest.mark.long
def test_resumed_by_other_workers(recipe: Path, alone: Path, tmp_path: Path, warm: WarmProcess) -> None:
    """Exactly where they divide the parts; otherwise only with --allow-change, and told what is left out."""
    run = tmp_path / "run"
    half = ["train", recipe, f"run.directory={run}", "--workers", 2, "run.steps=12", "--resume", "auto"]
    lockstep(*half, cwd=tmp_path).succeeded()
    longer = [recipe, f"run.directory={run}", "--resume", "auto", "--allow-change"]
    warm.worker(*longer, "run.steps=15", cwd=tmp_path).succeeded()
    assert digests(run) == digests(alone)[:15]

    three = ["train", *longer, "--workers", 3, "data.streaming_parts=null", "run.steps=18"]
    refused = lockstep(*[word for word in three if word != "--allow-change"], cwd=tmp_path)
    refused.failed_with(2, "run.steps: 15 -> 18", "data.streaming_parts: 2 -> None", "--allow-change")
    told = lockstep(*three, cwd=tmp_path).succeeded()
    words = "stream: 3 parts instead of 2: the order is another one from here on; what was not read yet of the epochs before"
    assert (told.out + told.err).count(words) == 1
    assert digests(run)[:15] == digests(alone)[:15]
    assert digests(run)[15:] != digests(alone)[15:18]
    same_recipe = lockstep("train", recipe, *longer[1:3], "auto", "data.streaming_parts=null", "run.steps=18",
                           "--workers", 2, cwd=tmp_path)  # fmt: skip
    same_recipe.failed_with(
        2, "its stream is in 3 parts, which cannot go on as 2 parts with 2 workers", "--allow-change"
    )


def test_parts_that_workers_cannot_share_are_refused(recipe: Path, tmp_path: Path) -> None:
    refused = lockstep("train", recipe, f"run.directory={tmp_path / 'x'}", "--workers", 3, cwd=tmp_path)
    refused.failed_with(2, "data.streaming_parts 2 cannot be shared by 3 workers")


def test_evaluate_and_generate_read_the_stream_again(alone: Path, tmp_path: Path, warm: WarmProcess) -> None:
    evaluated = warm.lockstep("evaluate", alone, cwd=tmp_path).succeeded()
    last = read_metrics(alone)[1][-1]["evaluation"]
    assert f"loss {last['loss']:.4g}," in evaluated.out
    generated = warm.lockstep("generate", alone, "--tokens", 8, "--prompt", "the cat", cwd=tmp_path).succeeded()
    assert generated.out.startswith("the cat")
    refused = warm.lockstep("evaluate", alone, "--dataset", tmp_path, cwd=tmp_path)
    refused.failed_with(2, "reads hf:", "as it comes; remove it")


def test_nobody_can_compute_what_a_streamed_run_read(alone: Path, tmp_path: Path, warm: WarmProcess) -> None:
    for command in (["audit", alone], ["order", alone, "--step", 3]):
        refused = warm.lockstep("data", *command, cwd=tmp_path)
        refused.failed_with(2, "reads a source as it comes (order 'streamed-1')", "prepare the data of a run")


def test_a_source_that_changed_is_not_resumed(tmp_path: Path, warm: WarmProcess) -> None:
    source = write_source(tmp_path / "source", "jsonl")
    values = tiny_gpt(Path(), Path(), run={"steps": 6}, checkpoint={"every_steps": 3})
    values["data"] = {"source": f"hf:{source}", "streaming": True, "sequence_tokens": 64, "validation_fraction": 0.2}
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    run = [recipe, f"run.directory={tmp_path / 'run'}"]
    warm.worker(*run, cwd=tmp_path).succeeded()
    (source / "0.jsonl").write_text('{"text": "another document", "other": 1}\n')
    longer = warm.worker(*run, "run.steps=9", "--resume", "auto", "--allow-change", cwd=tmp_path)
    longer.failed_with(2, "was trained on other data or in another order")
    warm.lockstep("evaluate", tmp_path / "run", cwd=tmp_path).failed_with(2, "not the dataset that")


def test_images_are_streamed_too(tmp_path: Path, warm: WarmProcess) -> None:
    source = write_source(tmp_path / "images", "images")
    lenet = yaml.safe_load((Path(__file__).parents[2] / "launch" / "recipes" / "lenet-digits.yaml").read_text())
    lenet["run"]["steps"] = 6
    lenet["data"] = {
        "source": f"hf:{source}",
        "streaming": True,
        "image_size_pixels": 32,
        "image_channels": 1,
        "validation_fraction": 0.3,
    }
    lenet["batch"] = {"global_samples": 8, "micro_samples": 4}
    lenet["schedule"] = {"warmup_steps": 0}
    lenet["evaluation"] = {"samples": 6}
    lenet["tracking"] = {"wandb": "off", "tensorboard": False}
    lenet["checkpoint"] = {"every_steps": 3}
    recipe = write_recipe(tmp_path / "lenet.yaml", lenet)
    straight, run = tmp_path / "straight", tmp_path / "run"
    warm.worker(recipe, f"run.directory={straight}", cwd=tmp_path).succeeded()
    warm.worker(recipe, f"run.directory={run}", "run.steps=3", cwd=tmp_path).succeeded()
    resume = [recipe, f"run.directory={run}", "--resume", "auto", "--allow-change"]
    told = warm.worker(*resume, cwd=tmp_path).succeeded()
    assert "images come in the order of the source" in told.err
    assert digests(run) == digests(straight)
