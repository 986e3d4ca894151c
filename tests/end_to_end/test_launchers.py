"""One run, whoever starts it: the same losses and the same digests under every launcher and at every world size."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distrib.capabilities import ENGINES
from distrib.slurm_variables import SlurmStep, meeting_port
from tests.end_to_end.runs import (
    LOCKSTEP,
    command,
    digests,
    environment,
    losses,
    side_by_side,
    srun_variables,
    write_recipe,
)
from tests.ports import free_ports

STEPS = 8
# Stand for a port that is free when the launchers start, alone or with this host's address, for the number of the node that
# a launcher runs on, and for a file of hosts, or of two that are reached by ssh.
FREE_PORT, ENDPOINT, NODE, HOSTFILE, TWO_HOSTS = object(), object(), object(), object(), object()
WORKER: list[object] = [sys.executable, "-m", "launch.train"]
TORCHRUN: list[object] = [sys.executable, "-m", "torch.distributed.run"]
TORCHRUN_ON_TWO_NODES: list[object] = [
    *TORCHRUN, "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-endpoint", ENDPOINT, "-m", "launch.train",
]  # fmt: skip
# Without --multi_gpu it would start one process, on a CPU too. Everything is given, so that no defaults need to be told.
ACCELERATE_LAUNCH: list[object] = [
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2, "--num_machines", 1,
    "--main_process_port", FREE_PORT, "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
ACCELERATE_ON_TWO_NODES: list[object] = [
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 2, "--num_machines", 2, "--machine_rank", NODE,
    "--main_process_ip", "127.0.0.1", "--main_process_port", FREE_PORT, "--same_network", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--multi_gpu", "-m", "launch.train",
]  # fmt: skip
DEEPSPEED_LAUNCH: list[object] = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", FREE_PORT]
DEEPSPEED = ["parallel.engine=deepspeed", "parallel.zero_stage=2"]


@dataclass(frozen=True)
class Start:
    """A way to start the run: the words before the recipe and those after it."""

    before: Sequence[object]
    after: Sequence[object] = ()
    launcher: str = "lockstep train"
    """What the table of ranks says."""
    workers: int = 2
    nodes: int = 1
    """Commands that run side by side, each as one node of a cluster would."""
    srun: bool = False
    """Whether these are the tasks of a step of Slurm."""
    steps: int = STEPS


STARTS = {
    "one worker": Start([LOCKSTEP, "train"], ["--workers", 1], workers=1),
    "three workers": Start([LOCKSTEP, "train"], ["--workers", 3], workers=3),
    "python -m": Start(WORKER, launcher="python -m launch.train", workers=1),
    "torchrun": Start([*TORCHRUN, "--standalone", "--nproc-per-node", 2, "-m", "launch.train"], launcher="torchrun"),
    "torchrun on two nodes": Start(TORCHRUN_ON_TWO_NODES, launcher="torchrun", nodes=2),
    "debug": Start([LOCKSTEP, "train"], ["batch.global_samples=12", "--debug"], "lockstep train --debug", workers=1, steps=5),
    "srun": Start(WORKER, launcher="srun", nodes=2, srun=True),
    "srun torchrun": Start(TORCHRUN_ON_TWO_NODES, launcher="torchrun", nodes=2, srun=True),
    "srun of the deepspeed engine": Start(WORKER, DEEPSPEED, launcher="srun", nodes=2, srun=True),
    "srun of the accelerate engine": Start(
        WORKER, ["parallel.engine=accelerate"], launcher="srun", nodes=2, srun=True
    ),
    "deepspeed engine": Start([LOCKSTEP, "train"], [*DEEPSPEED, "--workers", 3], workers=3),
    "deepspeed launcher": Start(
        [*DEEPSPEED_LAUNCH, "--num_gpus", 2, "--module", "launch.train"], DEEPSPEED, "deepspeed"
    ),
    "deepspeed launcher with a hostfile": Start(
        [*DEEPSPEED_LAUNCH, "--hostfile", HOSTFILE, "--include", "localhost:0,1", "--no_ssh_check", "--master_addr",
         "127.0.0.1", "--module", "launch.train"], launcher="deepspeed",
    ),
    "deepspeed launcher on two nodes": Start(
        [*DEEPSPEED_LAUNCH, "--hostfile", HOSTFILE, "--num_gpus", 1, "--no_ssh", "--node_rank", NODE, "--master_addr",
         "127.0.0.1", "--module", "launch.train"], DEEPSPEED, "deepspeed", nodes=2,
    ),
    "deepspeed launcher over two hosts": Start(
        [*DEEPSPEED_LAUNCH, "--hostfile", TWO_HOSTS, "--master_addr", "127.0.0.2", "--module", "launch.train"],
        DEEPSPEED, "deepspeed",
    ),
    "accelerate engine": Start([LOCKSTEP, "train"], ["parallel.engine=accelerate", "--workers", 3], workers=3),
    "accelerate launch": Start(
        [*ACCELERATE_LAUNCH, "--multi_gpu", "-m", "launch.train"], ["parallel.engine=accelerate"], "accelerate launch"
    ),
    "accelerate launch on two nodes": Start(
        ACCELERATE_ON_TWO_NODES, ["parallel.engine=accelerate"], "accelerate launch", nodes=2
    ),
    "accelerate launch of the native engine": Start(
        [*ACCELERATE_LAUNCH, "--multi_gpu", "-m", "launch.train"], launcher="accelerate launch"
    ),
}  # fmt: skip
# In place of the real ones: every host is this machine, and a command on it has an environment of its own.
SSH = """#!/usr/bin/env bash
while [ "${1#-}" != "$1" ]; do shift 2; done
shift
exec env -i HOME="$HOME" PATH="$PATH" HF_HOME="$HF_HOME" OMP_NUM_THREADS=1 bash -c "$*"
"""
PDSH = """#!/usr/bin/env bash
while getopts Sf:w: option; do
    if [ "$option" = w ]; then IFS=, read -r -a hosts <<< "$OPTARG"; fi
done
shift $((OPTIND - 1))
for node in "${!hosts[@]}"; do
    ssh -l root "${hosts[node]}" "${*//%n/$node}" &
done
status=0
for node in "${!hosts[@]}"; do wait -n || status=$?; done
exit "$status"
"""
SHORT = ["three workers", "python -m", "torchrun", "debug", "srun", "accelerate launch"]


@pytest.fixture(scope="module")
def recipe_without_chance(
    recipe_values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Dropout depends on how a batch is cut, and a falling rate on the number of steps: neither is here."""
    values = recipe_values(run={"steps": STEPS}, model={"dropout": 0.0}, schedule={"kind": "constant"})
    return write_recipe(tmp_path_factory.mktemp("launchers") / "recipe.yaml", values)


@pytest.fixture(scope="module")
def reference(recipe_without_chance: Path) -> Path:
    return launch("one worker", recipe_without_chance)[0]


def launch(name: str, recipe: Path) -> tuple[Path, str]:
    """Starts the run, and returns its directory and what was printed on stderr."""
    start, folder = STARTS[name], recipe.parent
    run = folder / name.replace(" ", "-")
    (folder / "hosts").write_text("localhost slots=2\n127.0.0.1 slots=2\n")
    (folder / "two-hosts").write_text("127.0.0.2 slots=1\n127.0.0.3 slots=1\n")
    (port,) = free_ports(1)
    envs = [unconfigured(folder) | {"PATH": with_ssh(folder / "bin")} for _ in range(start.nodes)]
    if start.srun:
        envs = [env | task for env, task in zip(envs, srun_variables([1] * start.nodes, job=os.getpid()), strict=True)]
    meanings = {
        FREE_PORT: port,
        ENDPOINT: f"127.0.0.1:{port}",
        HOSTFILE: folder / "hosts",
        TWO_HOSTS: folder / "two-hosts",
    }
    lines = [
        [
            *({**meanings, NODE: node}.get(word, word) for word in start.before),
            recipe,
            f"run.directory={run}",
            *start.after,
        ]
        for node in range(start.nodes)
    ]
    ended = side_by_side(lines, cwd=folder, envs=envs)
    return run, "".join(result.succeeded().err for result in ended)


def with_ssh(directory: Path) -> str:
    """A PATH on which ssh and pdsh reach this machine by any name."""
    directory.mkdir(exist_ok=True)
    for name, script in (("ssh", SSH), ("pdsh", PDSH)):
        (directory / name).write_text(script)
        (directory / name).chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def accelerate_launch() -> list[object]:
    (port,) = free_ports(1)
    return [port if word is FREE_PORT else word for word in ACCELERATE_LAUNCH]


def unconfigured(directory: Path) -> dict[str, str]:
    """An environment in which nobody has ever run `accelerate config`."""
    return environment(HF_HOME=str(directory))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.long]) for name in STARTS if name != "one worker"],
)
def test_every_launcher_gives_the_same_run(name: str, recipe_without_chance: Path, reference: Path) -> None:
    run, err = launch(name, recipe_without_chance)
    start = STARTS[name]
    assert digests(run) == digests(reference)[: start.steps]
    assert losses(run) == pytest.approx(losses(reference)[: start.steps], rel=1e-6)
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 0
    assert table_of_ranks(err) == [
        "rank  host  device  launcher",
        f"{'0' if start.workers == 1 else f'0-{start.workers - 1}'}  {platform.node()}  "
        f"{'cpu' if start.workers == 1 else f'{start.workers} x cpu'}  {start.launcher}",
    ]
    if name == "srun":
        assert f"met at 127.0.0.1:{meeting_port({}, SlurmStep(0, 2, 0, os.getpid(), 0))}" in err.splitlines()


def table_of_ranks(err: str) -> list[str]:
    """The table that a run of few hosts prints, which must be there once, with two spaces between its columns."""
    lines = err.splitlines()
    (begin,) = (number for number, line in enumerate(lines) if line.startswith("rank "))
    return [re.sub("  +", "  ", line) for line in lines[begin : begin + 2]]


def test_the_launchers_that_an_engine_claims_are_tried_here() -> None:
    tried = set()
    for start in STARTS.values():
        engine = next(
            (str(word).partition("=")[2] for word in start.after if str(word).startswith("parallel.engine=")), "native"
        )
        tried.add((engine, start.launcher.removesuffix(" --debug")))
    assert {(engine, name) for engine, able in ENGINES.items() for name in able.launchers} == tried


@pytest.mark.long
def test_two_jobs_of_slurm_on_one_host_do_not_meet(recipe_without_chance: Path, reference: Path) -> None:
    """Their ids follow each other, and their tasks start together."""
    folder, jobs = recipe_without_chance.parent, (os.getpid(), os.getpid() + 1)
    tasks = [(job, unconfigured(folder) | task) for job in jobs for task in srun_variables([1, 1], job)]
    lines = [[*WORKER, recipe_without_chance, f"run.directory={folder / f'job-{job}'}"] for job, _ in tasks]
    for ended in side_by_side(lines, cwd=folder, envs=[env for _, env in tasks]):
        ended.succeeded()
    for job in jobs:
        assert digests(folder / f"job-{job}") == digests(reference)


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
    torchrun = STARTS["torchrun"].before
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
    asked = [
        *accelerate_launch(),
        "--use_fsdp",
        "--fsdp_cpu_ram_efficient_loading",
        "false",
        "--fsdp_sync_module_states",
    ]
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
        *accelerate_launch(),
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
