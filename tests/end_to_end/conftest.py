"""Prepared once per session and shared: the corpus, its dataset, and runs that nothing has interrupted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import WarmProcess, lockstep, tiny_gpt, write_corpus, write_recipe


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    """Runs commands without the seconds that their imports take."""
    process = WarmProcess(tmp_path_factory.mktemp("warm"))
    yield process
    process.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="session")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as `lockstep prepare` makes it."""
    directory = tmp_path_factory.mktemp("prepared") / "corpus"
    lockstep(
        "prepare", f"text:{corpus}", "--out", directory, "--validation-fraction", 0.2, cwd=directory.parent
    ).succeeded()
    return directory


@pytest.fixture(scope="session")
def recipe_values(corpus: Path, dataset: Path) -> Callable[..., dict[str, Any]]:
    """The tiny recipe as a mapping, with changed sections."""

    def make(**sections: Any) -> dict[str, Any]:
        return tiny_gpt(dataset, corpus, **sections)

    return make


@pytest.fixture(scope="session")
def recipe(recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's file: 40 steps, a checkpoint every 5, dropout 0.1."""
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", recipe_values())


@pytest.fixture(scope="session")
def straight_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny recipe's run at a world size, never interrupted. Tests must not change it."""

    @functools.cache
    def run(world_size: int, steps: int = 40) -> Path:
        path = tmp_path_factory.mktemp("straight") / f"world-{world_size}"
        arguments = ["train", recipe, f"run.directory={path}", f"run.steps={steps}", "--workers", world_size]
        lockstep(*arguments, cwd=path.parent).succeeded()
        return path

    return run


@pytest.fixture(scope="session")
def learned_gpt(recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT trained on the corpus until it has learned its words. Tests must not change it."""
    directory = tmp_path_factory.mktemp("learned")
    values = recipe_values(
        run={"steps": 150},
        model={"width": 64, "dropout": 0.0},
        batch={"global_samples": 16, "micro_samples": 16},
        optimizer={"lr": 5.0e-3},
        schedule={"warmup_steps": 20},
        evaluation={"samples": None, "generated_tokens": 60},
        checkpoint={"every_steps": 100},
    )
    recipe = write_recipe(directory / "learn.yaml", values)
    lockstep("train", recipe, "run.directory=gpt", "--workers", 1, cwd=directory).succeeded()
    return directory / "gpt"


@pytest.fixture(scope="session")
def learned_lenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped recipe, whole. Tests must not change it."""
    directory = tmp_path_factory.mktemp("lenet")
    quiet = ["tracking.wandb=off", "tracking.tensorboard=false"]
    lockstep("train", "lenet-digits", "run.directory=lenet", *quiet, "--workers", 1, cwd=directory).succeeded()
    return directory / "lenet"


@pytest.fixture(scope="session")
def mixture(recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two streams, 3 to 1, in the windowed order, over shards of a few documents; no dropout."""
    root = tmp_path_factory.mktemp("mixture")
    streams = {
        name: {
            "source": f"text:{write_corpus(root / name, documents=40, seed=seed)}",
            "directory": str(root / f"prepared-{name}"),
            "weight": weight,
        }
        for name, seed, weight in (("web", 1, 3), ("code", 2, 1))
    }
    values = recipe_values(
        run={"steps": 12},
        model={"dropout": 0.0},
        data={"order": "windowed", "lanes": 3, "window_shards": 2, "shard_bytes": 6000},
        batch={"global_samples": 8},
        checkpoint={"every_steps": 6},
        evaluation={"samples": 8, "every_steps": 6},
    )
    del values["data"]["source"], values["data"]["directory"]
    values["data"]["streams"] = streams
    return write_recipe(root / "mixture.yaml", values)
