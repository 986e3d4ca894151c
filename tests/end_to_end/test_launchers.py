"""One run, whoever starts it: the same losses and the same digests under every launcher and at every world size."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrib.capabilities import ENGINES
from tests.end_to_end.runs import LOCKSTEP, command, digests, environment, losses, write_recipe

STEPS = 8
# Without --multi_gpu it would start one process, on a CPU too. Everything is given, so that no defaults need to be told.
ACCELERATE_LAUNCH: list[object] = [
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2, "--num_machines", 1,
    "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
# Stands for a port that is free when the launcher starts.
FREE_PORT = object()
DEEPSPEED_LAUNCH: list[object] = [
    sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", 2, "--master_port", FREE_PORT, "--module",
    "launch.train",
]  # fmt: skip
DEEPSPEED = ["parallel.engine=deepspeed", "parallel.zero_stage=2"]
LAUNCHERS: dict[str, tuple[list[object], list[object], int]] = {
    "one worker": ([LOCKSTEP, "train"], ["--workers", 1], STEPS),
    "three workers": ([LOCKSTEP, "train"], ["--workers", 3], STEPS),
    "python -m": ([sys.executable, "-m", "launch.train"], [], STEPS),
    "torchrun": (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "launch.train"],
        [],
        STEPS,
    ),
    "debug": ([LOCKSTEP, "train"], ["--debug"], 5),
    "deepspeed engine": ([LOCKSTEP, "train"], [*DEEPSPEED, "--workers", 3], STEPS),
    "deepspeed launcher": (DEEPSPEED_LAUNCH, [*DEEPSPEED], STEPS),
    "accelerate engine": ([LOCKSTEP, "train"], ["parallel.engine=accelerate", "--workers", 3], STEPS),
    "accelerate launch": (
        [*ACCELERATE_LAUNCH, "--multi_gpu", "-m", "launch.train"],
        ["parallel.engine=accelerate"],
        STEPS,
    ),
    "accelerate launch of the native engine": ([*ACCELERATE_LAUNCH, "--multi_gpu", "-m", "launch.train"], [], STEPS),
}
LONG = ["deepspeed engine", "deepspeed launcher", "accelerate engine", "accelerate launch of the native engine"]


@pytest.fixture(scope="module")
def recipe_without_chance(
    recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Dropout depends on how a batch is cut, and a falling rate on the number of steps: neither is here."""
    values = recipe_values(run={"steps": STEPS}, model={"dropout": 0.0}, schedule={"kind": "constant"})
    return write_recipe(tmp_path_factory.mktemp("launchers") / "recipe.yaml", values)


@pytest.fixture(scope="module")
def reference(recipe_without_chance: Path) -> Path:
    return launch("one worker", recipe_without_chance)


def launch(launcher: str, recipe: Path) -> Path:
    before, after, _ = LAUNCHERS[launcher]
    before = [free_port() if word is FREE_PORT else word for word in before]
    run = recipe.parent / launcher.replace(" ", "-")
    command(
        *before, recipe, f"run.directory={run}", *after, cwd=recipe.parent, env=unconfigured(run.parent)
    ).succeeded()
    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unconfigured(directory: Path) -> dict[str, str]:
    """An environment in which nobody has ever run `accelerate config`."""
    return environment(HF_HOME=str(directory))


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in LONG else [])
        for name in LAUNCHERS
        if name != "one worker"
    ],
)
def test_every_launcher_gives_the_same_run(launcher: str, recipe_without_chance: Path, reference: Path) -> None:
    run = launch(launcher, recipe_without_chance)
    steps = LAUNCHERS[launcher][2]
    assert digests(run) == digests(reference)[:steps]
    assert losses(run) == pytest.approx(losses(reference)[:steps], rel=1e-6)
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 0


def test_the_launchers_that_an_engine_claims_are_tried_here() -> None:
    words = {
        "torch.distributed.run": "torchrun",
        "deepspeed.launcher.runner": "deepspeed",
        "accelerate.commands.launch": "accelerate launch",
        LOCKSTEP: "lockstep train",
    }
    tried = set()
    for before, after, _ in LAUNCHERS.values():
        engine = next(
            (str(word).partition("=")[2] for word in after if str(word).startswith("parallel.engine=")), "native"
        )
        tried.add((engine, next((words[word] for word in before if word in words), "python -m launch.train")))
    assert {(engine, name) for engine, able in ENGINES.items() for name in able.launchers} == tried


def test_the_comparison_can_fail(recipe_without_chance: Path, reference: Path) -> None:
    """Another seed is another order and other weights."""
    run = recipe_without_chance.parent / "other-seed"
    worker = [sys.executable, "-m", "launch.train", recipe_without_chance, f"run.directory={run}", "run.seed=1"]
    command(*worker, cwd=run.parent).succeeded()
    assert not set(digests(run)) & set(digests(reference))
    assert losses(run) != pytest.approx(losses(reference), rel=1e-3)


def test_torchrun_makes_any_failure_1_but_outcome_json_keeps_the_truth(
    recipe_without_chance: Path, tmp_path: Path
) -> None:
    torchrun = LAUNCHERS["torchrun"][0]
    ended = command(
        *torchrun, recipe_without_chance, "run.directory=run", "model.vocabulary_size=100", cwd=tmp_path,
        env=environment(),
    )  # fmt: skip
    assert ended.code == 1
    assert len(ended.told) == 1
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["exit_code"] == 2
    assert "model.vocabulary_size 100" in outcome["reason"]


def test_what_accelerate_silently_would_not_do_ends_the_run_before_its_first_step(
    recipe_without_chance: Path, tmp_path: Path
) -> None:
    """`accelerate launch --use_fsdp` on a CPU: it would replicate, and its exit code is 1 whatever went wrong."""
    asked = [*ACCELERATE_LAUNCH, "--use_fsdp", "--fsdp_cpu_ram_efficient_loading", "false", "--fsdp_sync_module_states"]
    ended = command(
        *asked, "false", "-m", "launch.train", recipe_without_chance, "parallel.engine=accelerate", "run.directory=run",
        cwd=tmp_path, env=unconfigured(tmp_path),
    )  # fmt: skip
    assert ended.code == 1
    assert len(ended.told) == 1
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["exit_code"], outcome["step"]) == (2, 0)
    assert "ACCELERATE_USE_FSDP=true, and Accelerate gives MULTI_CPU" in outcome["reason"]
    assert ended.told == [f"lockstep: error: {outcome['reason']}"]


@pytest.mark.long
def test_what_accelerate_config_wrote_is_not_passed_over_by_another_launcher(
    recipe_without_chance: Path, tmp_path: Path
) -> None:
    """`accelerate launch` alone reads the file: without a word the run would be another one than was asked for."""
    written = tmp_path / "accelerate" / "default_config.yaml"
    written.parent.mkdir()
    written.write_text("distributed_type: FSDP\nmixed_precision: bf16\n")
    arguments = ["train", recipe_without_chance, "parallel.engine=accelerate", "run.directory=run", "--workers", 2]
    ended = command(LOCKSTEP, *arguments, cwd=tmp_path, env=unconfigured(tmp_path))
    ended.failed_with(2, f"mixed_precision=bf16 in {written}", "parallel.precision=fp32")
    ended = command(LOCKSTEP, *arguments, "parallel.precision=bf16", cwd=tmp_path, env=unconfigured(tmp_path))
    ended.failed_with(2, f"distributed_type=FSDP in {written}", "parallel.engine=native")


@pytest.mark.long
def test_one_process_in_place_of_several_is_refused(recipe_without_chance: Path, tmp_path: Path) -> None:
    """`accelerate launch --cpu` starts one process, however many it was asked for."""
    ended = command(
        *ACCELERATE_LAUNCH,
        "--cpu",
        "-m",
        "launch.train",
        recipe_without_chance,
        cwd=tmp_path,
        env=unconfigured(tmp_path),
    )
    assert ended.code == 1
    (told,) = ended.told
    assert "was asked for several processes and started one" in told
    assert not (tmp_path / "runs").exists()
