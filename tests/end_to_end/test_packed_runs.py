"""Whole runs over packed documents that are kept apart: one run at every world size, killed or not, under every engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig
from data.dataset import open_dataset
from data.store import LocalStore
from launch.tracking.metrics_file import read_metrics
from tests.end_to_end.runs import (
    LOCKSTEP,
    WORDS,
    WarmProcess,
    digests,
    final_bytes,
    history,
    lockstep,
    losses,
    started,
    wait_for_step,
    write_recipe,
)

STEPS = 24
HEAD = "packing-best_fit-T64.json"


@pytest.fixture(scope="module")
def packed_recipe(recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 5 to 300 bytes in sequences of 64 tokens. Dropout, which depends on how a batch is cut, is off."""
    folder = tmp_path_factory.mktemp("packed")
    choose = random.Random(3)
    texts = [" ".join(choose.choice(WORDS) for _ in range(choose.randint(1, 60))) for _ in range(400)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{text}."}) + "\n" for text in texts))
    data = {
        "source": f"jsonl:{folder}/texts.jsonl#text",
        "directory": str(folder / "prepared"),
        "packing": "best_fit",
        "separate_documents": True,
    }
    values = recipe_values(
        run={"steps": STEPS}, data=data, model={"dropout": 0.0}, batch={"global_samples": 13, "micro_samples": 4}
    )
    return write_recipe(folder / "packed.yaml", values)


@pytest.fixture(scope="module")
def packed_run(packed_recipe: Path) -> Path:
    """One worker, never interrupted; it prepared the dataset and packed it."""
    run = packed_recipe.parent / "straight"
    ended = lockstep("train", packed_recipe, f"run.directory={run}", "--workers", 1, cwd=run.parent).succeeded()
    assert ended.out.count("packing documents into sequences of 64 tokens, once") == 1
    assert (packed_recipe.parent / "prepared" / HEAD).exists()
    return run


@pytest.mark.parametrize(
    "layout",
    [
        [],
        pytest.param(["parallel.zero_stage=3", "parallel.activation_checkpointing=full"], marks=pytest.mark.long),
        pytest.param(["parallel.compile=true", "parallel.activation_checkpointing=selective"], marks=pytest.mark.long),
        pytest.param(["parallel.engine=deepspeed", "parallel.zero_stage=3"], marks=pytest.mark.long),
        pytest.param(["parallel.engine=accelerate"], marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_two_workers_make_the_same_run(
    layout: list[str], packed_recipe: Path, packed_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = lockstep("train", packed_recipe, f"run.directory={run}", *layout, "--workers", 2, cwd=tmp_path).succeeded()
    assert "packing documents" not in ended.out
    assert digests(run) == digests(packed_run)
    assert losses(run) == pytest.approx(losses(packed_run), rel=2e-6)
    items = [record["tokens"] for record in read_metrics(run)[0]]
    assert items == [record["tokens"] for record in read_metrics(packed_run)[0]]


def test_a_killed_run_goes_on_to_the_same_bytes(packed_recipe: Path, packed_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments: list[object] = ["train", packed_recipe, f"run.directory={run}", "--resume", "auto", "--workers", 1]
    with started(LOCKSTEP, *arguments, cwd=tmp_path) as process:
        wait_for_step(run, 7, None, process)
    lockstep(*arguments, cwd=tmp_path).succeeded()
    assert history(run) == history(packed_run)
    assert final_bytes(run) == final_bytes(packed_run)


def test_the_evaluation_counts_what_has_a_target(packed_recipe: Path, packed_run: Path, warm: WarmProcess) -> None:
    """Over the whole split: every token but each document's first."""
    ended = warm.lockstep("evaluate", packed_run, cwd=packed_recipe.parent).succeeded()
    config = DataConfig(sequence_tokens=64, packing="best_fit", separate_documents=True)
    store = LocalStore(packed_recipe.parent / "prepared")
    split = json.loads(store.read("manifest.json") or b"")["manifest"]["splits"]["validation"]
    samples = open_dataset(store, config, "validation").samples
    targets = split["tokens"] - split["documents"]
    assert targets < samples * 64
    assert f"tokens {targets:,}" in ended.out
    metrics = {
        name: float(value.replace(",", ""))
        for name, value in (
            part.rsplit(" ", 1) for part in ended.out.split(": ", 1)[1].replace(", ", "\n").splitlines()
        )
    }
    # A byte is a token, but the end-of-document token stands for none.
    bits = metrics["loss"] / 0.6931 * targets / (split["tokens"] - 2 * split["documents"])
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=2e-3)


def test_what_lies_beside_is_checked_and_refused(packed_recipe: Path, warm: WarmProcess, tmp_path: Path) -> None:
    """A packing that is damaged ends the run with 78; a changed key is refused on resume."""
    prepared = packed_recipe.parent / "prepared"
    (tmp_path / "prepared").mkdir()
    for path in prepared.glob("[!.]*"):
        (tmp_path / "prepared" / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "prepared" / "packing-best_fit-T64-train-00000.index"
    content = bytearray(index.read_bytes())
    content[100] ^= 1
    index.write_bytes(content)
    arguments = [packed_recipe, f"data.directory={tmp_path}/prepared", "run.directory=run"]
    ended = warm.worker(*arguments, cwd=tmp_path)
    ended.failed_with(78, f"remove {HEAD}, and `lockstep train` builds it anew")


def test_a_resumed_run_keeps_its_packing(packed_recipe: Path, packed_run: Path, warm: WarmProcess) -> None:
    arguments = [packed_recipe, f"run.directory={packed_run}", "--resume", "auto", "data.separate_documents=false"]
    ended = warm.worker(*arguments, cwd=packed_run.parent)
    ended.failed_with(2, "impossible: data.separate_documents: True -> False")


def test_a_model_that_takes_no_documents_is_refused(
    packed_recipe: Path, recipe_values: Callable[..., dict[str, Any]], warm: WarmProcess, tmp_path: Path
) -> None:
    (tmp_path / "bigram.py").write_text(
        "from torch import nn\n\n"
        "def build(shape):\n"
        "    return nn.Sequential(nn.Embedding(shape.vocabulary_size, 8), nn.Linear(8, shape.vocabulary_size))\n"
    )
    values = recipe_values(data={"separate_documents": True})
    values["model"] = {"kind": "bigram:build"}
    recipe = write_recipe(tmp_path / "bigram.yaml", values)
    ended = lockstep("train", recipe, "--workers", 1, cwd=tmp_path)
    ended.failed_with(2, "model.kind bigram:build: its forward takes no `documents`")
