"""What every launcher sets, read as it is meant; and what contradicts itself, refused in a line that names it.

The variables of Slurm are those that Slurm 22.05.8 gave, recorded from a batch script, from `srun` in it and from shells of
`salloc`.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from typing import Any

import pytest

from distrib.launchers import (
    ALONE,
    BY_HAND,
    STARTED_BY_LOCKSTEP,
    Launch,
    choose_gpu,
    read_launch,
    refuse_meeting_alone,
    refuse_to_start_workers,
)
from distrib.ports import holder_of_port
from distrib.slurm_variables import SlurmStep, expand_node_list, meeting_port
from tests.ports import free_ports

BATCH = {
    "SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_NPROCS": "4", "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "3,1",
}  # fmt: skip
SRUN = {
    **BATCH, "SLURMD_NODENAME": "n2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_PROCID": "3",
    "SLURM_STEPID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "3,1",
}  # fmt: skip
FIRST_TASK = {**SRUN, "SLURMD_NODENAME": "n1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
# Slurm's own step around a shell: one task, and SLURM_NTASKS still what was asked for.
INTERACTIVE = {
    **BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
}  # fmt: skip
# A shell of `salloc` on the login node.
LOGIN = {name: BATCH[name] for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS")}
PLACE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {
    **PLACE, "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
TORCHRUN_OF_TWO_NODES = {**TORCHRUN, "WORLD_SIZE": "4", "RANK": "3", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "1"}
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
DEEPSPEED = {**PLACE, "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"}
LOCKSTEP = {**PLACE, "LOCAL_WORLD_SIZE": "2", STARTED_BY_LOCKSTEP: "1"}
ONE_TASK = {**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
TWO_TASKS = {**SRUN, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
OF_TWO = Launch("", rank=1, size=2, local_rank=1, address="10.0.0.1", port=29500)


def of_two(launcher: str, **changes: Any) -> Launch:
    return Launch(**{**vars(OF_TWO), "launcher": launcher, **changes})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch(ALONE)),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, Launch(ALONE)),
        ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no"}, Launch("accelerate launch")),
        # Exported once and for all.
        (
            {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "a"},
            Launch("accelerate launch"),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, Launch(ALONE)),
        (PLACE, of_two(BY_HAND)),
        (LOCKSTEP, of_two("lockstep train")),
        (TORCHRUN, of_two("torchrun")),
        (DEEPSPEED, of_two("deepspeed")),
        (ACCELERATE, of_two("accelerate launch")),
        (SRUN, Launch("srun", rank=3, size=4, local_rank=0, address="n1", port=15001)),
        ({**SRUN, "MASTER_ADDR": "head"}, Launch("srun", rank=3, size=4, local_rank=0, address="head", port=15001)),
        ({**SRUN, "MASTER_PORT": "7"}, Launch("srun", rank=3, size=4, local_rank=0, address="n1", port=7)),
        ({**SRUN, **PLACE, "RANK": "3", "WORLD_SIZE": "4"}, of_two(BY_HAND, rank=3, size=4)),
        (ONE_TASK, Launch("srun")),
        ({**INTERACTIVE}, Launch("srun")),
        # srun starts a launcher on each node: SLURM_NTASKS is the number of nodes.
        ({**TWO_TASKS, **TORCHRUN_OF_TWO_NODES}, of_two("torchrun", rank=3, size=4)),
        ({**TWO_TASKS, **DEEPSPEED, "CROSS_SIZE": "2"}, of_two("deepspeed")),
        ({**ONE_TASK, **TORCHRUN}, of_two("torchrun")),
        ({**ONE_TASK, **LOCKSTEP}, of_two("lockstep train")),
        # A launcher in the batch script, or in a shell of `salloc`.
        ({**BATCH, **TORCHRUN}, of_two("torchrun")),
        ({**BATCH, **LOCKSTEP}, of_two("lockstep train")),
        ({**INTERACTIVE, **LOCKSTEP}, of_two("lockstep train")),
        ({**BATCH, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}, Launch(ALONE)),
    ],
)
def test_the_place_is_what_the_launcher_meant(environment: dict[str, str], expected: Launch) -> None:
    assert read_launch(environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        # Half set.
        ({"RANK": "0"}, "half set: RANK without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "half set: LOCAL_RANK without RANK"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "without RANK, LOCAL_RANK"),
        ({**PLACE, "MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_PROCID"}, "half set: .* without SLURM_PROCID"),
        ({"SLURM_STEP_ID": "0"}, "half set: SLURM_STEP_ID without SLURM_STEP_NUM_TASKS"),
        (
            {name: v for name, v in SRUN.items() if "NODELIST" not in name},
            "without SLURM_STEP_NODELIST; set MASTER_ADDR",
        ),
        # No numbers, or out of range.
        ({**PLACE, "RANK": "one"}, "RANK='one' is not a whole number"),
        ({**PLACE, "RANK": "-1"}, "RANK='-1' is not a whole number"),
        ({**PLACE, "MASTER_PORT": ""}, "MASTER_PORT='' is not a whole number"),
        ({**PLACE, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({**PLACE, "MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
        ({**PLACE, "RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({**PLACE, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 is not below WORLD_SIZE=2"),
        ({**TORCHRUN_OF_TWO_NODES, "LOCAL_RANK": "3"}, "LOCAL_RANK=3 is not below LOCAL_WORLD_SIZE=2"),
        ({**SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID=4 is not below SLURM_STEP_NUM_TASKS=4"),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "4(x2)"}, re.escape("SLURM_STEP_NUM_TASKS='4(x2)' is not a whole")),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[1-"}, re.escape("SLURM_STEP_NODELIST: 'n[1-' is no list of nodes")),
        # Two launchers, or one within another that does not know of it.
        ({**TORCHRUN, **DEEPSPEED}, r"torchrun \(TORCHELASTIC_RUN_ID\) and deepspeed \(CROSS_SIZE\)"),
        ({**LOCKSTEP, **TORCHRUN}, "two launchers at once: lockstep train .* and torchrun"),
        ({**SRUN, **PLACE}, "RANK=1 WORLD_SIZE=2, and this is task 3 of 4 of Slurm's step 1.0"),
        ({**SRUN, **TORCHRUN}, "torchrun knows of one node, and this is task 3 of 4"),
        ({**SRUN, **ACCELERATE}, "accelerate launch knows of one node"),
        ({**SRUN, **DEEPSPEED}, "deepspeed knows of one node"),
        ({**SRUN, **LOCKSTEP}, "lockstep train knows of one node"),
        ({**SRUN, "SLURM_NTASKS": "2"}, "of two steps: SLURM_STEP_NUM_TASKS=4, SLURM_NTASKS=2"),
        # Rank 0 is not where the others look for it.
        ({**FIRST_TASK, "SLURMD_NODENAME": "n2"}, "rank 0 runs on n2, and n1 is the first .* set MASTER_ADDR=n2"),
        # One process where several were asked for.
        (BATCH, "SLURM_NTASKS=4, but srun did not start this process"),
        (LOGIN, "SLURM_NTASKS=4, but srun did not start this process"),
        ({**BATCH, "SLURM_NTASKS": "1"}, "SLURM_JOB_NUM_NODES=2, but srun did not start this process"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2: MPI's launchers"),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "was asked for several processes"),
        (
            {**ONE_TASK, "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "was asked for several processes",
        ),
    ],
)
def test_a_contradiction_is_one_line_that_names_it(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        read_launch(environment)
    assert "\n" not in str(refusal.value)


def test_one_that_was_only_told_where_others_meet_does_not_train_alone() -> None:
    for environment, words in (
        ({"MASTER_ADDR": "a"}, "half set: MASTER_ADDR without RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT; start with"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "MASTER_ADDR, MASTER_PORT without RANK"),
    ):
        with pytest.raises(ValueError, match=words):
            refuse_meeting_alone(read_launch(environment), environment)
        for told in (ONE_TASK, PLACE, {"ACCELERATE_MIXED_PRECISION": "no"}):
            refuse_meeting_alone(read_launch({**environment, **told}), {**environment, **told})
        refuse_to_start_workers(environment)


def test_the_argument_that_deepspeed_passes_must_agree() -> None:
    assert read_launch(DEEPSPEED, local_rank_argument="1").local_rank == 1
    for environment, launcher in ((DEEPSPEED, "deepspeed"), (TORCHRUN, "torchrun")):
        with pytest.raises(ValueError, match=f"--local_rank=0 contradicts local rank 1, which {launcher} gave"):
            read_launch(environment, local_rank_argument="0")
    with pytest.raises(ValueError, match="--local_rank=first contradicts local rank 1"):
        read_launch(DEEPSPEED, local_rank_argument="first")
    with pytest.raises(ValueError, match="--local_rank=1 contradicts local rank 0"):
        read_launch({}, local_rank_argument="1")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (PLACE, "whoever set WORLD_SIZE has started 2 of it; start `python -m launch.train`"),
        (TORCHRUN, "torchrun has started 2 of it"),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, "torchrun has started 1 of it"),
        (DEEPSPEED, "deepspeed has started 2 of it"),
        (ACCELERATE, "accelerate launch has started 2 of it"),
        (LOCKSTEP, "lockstep train has started 2 of it"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "half set: RANK, WORLD_SIZE without LOCAL_RANK"),
        ({"LOCAL_RANK": "0"}, "half set: LOCAL_RANK without RANK"),
        (SRUN, "srun has started 4 of it"),
        (BATCH, "SLURM_JOB_NUM_NODES=2, and `lockstep train` starts workers on this host alone"),
        (LOGIN, "SLURM_JOB_NUM_NODES=2, and `lockstep train` starts workers on this host alone"),
    ],
)
def test_lockstep_train_under_another_launcher_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_to_start_workers(environment)


@pytest.mark.parametrize("environment", [{}, ONE_TASK, INTERACTIVE, {**BATCH, "SLURM_JOB_NUM_NODES": "1"}])
def test_lockstep_train_starts_workers_on_one_node_of_slurm(environment: dict[str, str]) -> None:
    refuse_to_start_workers(environment)


def test_one_process_to_debug_may_have_a_job_of_many_nodes() -> None:
    refuse_to_start_workers(BATCH, one_process=True)
    with pytest.raises(ValueError, match="srun has started 4 of it"):
        refuse_to_start_workers(SRUN, one_process=True)


def test_a_worker_s_gpu() -> None:
    assert [choose_gpu(of_two("torchrun", local_rank=rank), visible=2) for rank in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="local rank 2 has no GPU: this process sees 2"):
        choose_gpu(of_two("torchrun", local_rank=2), visible=2)
    # Slurm shows every task the GPU that it has bound to it.
    assert [choose_gpu(of_two("srun", local_rank=rank), visible=1) for rank in (0, 1, 7)] == [0, 0, 0]
    with pytest.raises(ValueError, match="local rank 7 has no GPU: this process sees 4"):
        choose_gpu(of_two("srun", local_rank=7), visible=4)
    with pytest.raises(ValueError, match="local rank 1 has no GPU: this process sees 1"):
        choose_gpu(of_two("torchrun"), visible=1)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        # As `scontrol show hostnames` of Slurm 22.05.8 expands them.
        ("n1", ["n1"]),
        ("n[1-3,07]", ["n1", "n2", "n3", "n07"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a,b[9-11],c", ["a", "b9", "b10", "b11", "c"]),
        ("n[1-3,5]y[7]", ["n1y7", "n2y7", "n3y7", "n5y7"]),
        ("gpu-a[008-010]", ["gpu-a008", "gpu-a009", "gpu-a010"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_a_list_of_nodes(text: str, nodes: list[str]) -> None:
    assert list(expand_node_list(text)) == nodes


@pytest.mark.parametrize(
    "text", ["", "n[1-", "n]", "n[]", "n[3-1]", "n[a-b]", "n[1-2-3]", "n1,,n2", ",n1", "n1 n2", "n[[1]]"]
)
def test_what_is_no_list_of_nodes(text: str) -> None:
    with pytest.raises(ValueError, match="is no list of"):
        list(expand_node_list(text))


def test_neighbours_on_a_host_meet_at_different_ports() -> None:
    """250 jobs with ids in a row, the steps and restarts of each: below the ports that Linux gives out by itself."""
    ports = [
        meeting_port({"SLURM_RESTART_COUNT": str(restart)}, SlurmStep(0, 2, 0, job, step))
        for job in range(8_000_000, 8_000_250)
        for step in range(8)
        for restart in range(7)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) > 1024
    assert max(ports) < 32768


def test_the_holder_of_a_port() -> None:
    holding = (
        "import socket, sys; held = socket.socket(); held.bind(('127.0.0.1', int(sys.argv[1]))); held.listen(); "
        "print('held', flush=True); input()"
    )
    (port,) = free_ports(1)
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        told = holder_of_port(port)
        with socket.socket() as connected:  # from another address of this host, at the same port
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves nothing behind
            connected.bind(("127.0.0.2", port))
            connected.connect(("127.0.0.1", port))
            assert holder_of_port(port) == told, "who listens there holds it, and not who is connected"
        process.communicate("\n")
    assert told is not None
    assert told.startswith(f"process {process.pid} (python")
    assert holder_of_port(port) is None
    with socket.socket(socket.AF_INET6) as ours:
        ours.bind(("::", 0))
        ours.listen()
        assert f"process {os.getpid()} (" in str(holder_of_port(ours.getsockname()[1]))


def test_a_holder_of_a_port_that_opens_and_closes_files_is_named() -> None:
    """Some of its files are gone between a list of them and a look at them; they have lower numbers than the socket."""
    busy = """if True:
        import os, socket
        files = [os.open(os.devnull, 0) for _ in range(500)]
        held = socket.create_server(("127.0.0.1", 0))
        print(held.getsockname()[1], flush=True)
        while True:
            os.closerange(files[0], files[-1] + 1)
            for _ in files:
                os.open(os.devnull, 0)
    """
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        told = {str(holder_of_port(port)).partition(" (")[0] for _ in range(100)}
        process.kill()
    assert told == {f"process {process.pid}"}
