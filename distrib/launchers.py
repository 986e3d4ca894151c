"""Who started this process and where in the run it stands, read from what the launcher set. Imports no torch.

`lockstep train`, torchrun, deepspeed and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and
something of their own that tells who it was; srun sets Slurm's. Where a launcher runs inside a step of srun, its
variables win, and the step's tasks are its nodes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from distrib.slurm_variables import SlurmStep, meeting_host, meeting_port, read_step, refuse_job_without_step
from distrib.variables import refuse_half_set, whole_number

STARTED_BY_LOCKSTEP = "LOCKSTEP_STARTED"
"""What `lockstep train` sets for its workers, so that they know who started them."""
LISTENING = "LOCKSTEP_LISTENING"
"""What `lockstep train` sets for rank 0: the file descriptor of a socket that listens at MASTER_PORT already, so that nobody
else can take the port before rank 0 has imported what it needs."""
ALONE = "python -m launch.train"
BY_HAND = "set by hand"
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_WAY_OUT = "start with torchrun or `lockstep train`, or unset them all"
# What a launcher alone sets, and how many nodes it believes to have.
_MARKS = {
    "lockstep train": (STARTED_BY_LOCKSTEP, None),
    "torchrun": ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE"),
    "deepspeed": ("CROSS_SIZE", "CROSS_SIZE"),
}
# What `accelerate launch` sets beside torchrun's variables, which it runs, or alone where it starts one process.
_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
# How many processes MPI's launchers started; they set nothing else that we read.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Launch:
    """This process's place in the run."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this host that the same launcher started."""
    address: str | None = None
    """Where the workers meet; None for one that is alone."""
    port: int | None = None
    listening: int | None = None
    """For rank 0: the file descriptor of a socket that listens at `port` already."""

    @property
    def meeting_point(self) -> str:
        return f"{self.address}:{self.port}"


def read_launch(environment: Mapping[str, str] = os.environ, *, local_rank_argument: str | None = None) -> Launch:
    """The place that `environment` describes; `local_rank_argument` is what deepspeed passes as --local_rank.

    Raises ValueError, in one line that names the variables, where they are half set, no numbers or out of range, and
    where two launchers contradict each other.
    """
    launcher = _find_launcher(environment)
    step = read_step(environment)
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        launch = _read_place(environment, launcher or BY_HAND)
        if step is not None:
            _refuse_another_step(environment, launch, step)
    elif step is not None and step.tasks > 1:
        launch = _place_in_step(environment, step)
    else:
        _refuse_one_of_several(environment)
        if step is None:
            refuse_job_without_step(environment)
        launch = Launch("accelerate launch" if _ACCELERATE in environment else ALONE if step is None else "srun")
    if local_rank_argument is not None and local_rank_argument != str(launch.local_rank):
        raise ValueError(
            f"--local_rank={local_rank_argument} contradicts local rank {launch.local_rank}, which {launch.launcher} gave; "
            "leave the argument to the launcher"
        )
    return launch


def refuse_meeting_alone(launch: Launch, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ValueError for a process that would train alone though it was told where others meet, by nobody that we know."""
    if launch.launcher == ALONE:
        refuse_half_set(environment, _PLACE, _WAY_OUT)


def refuse_to_start_workers(environment: Mapping[str, str] = os.environ, *, one_process: bool = False) -> None:
    """Raises ValueError where a launcher has started this process, which is about to start workers of its own, or, with
    `one_process`, to be the only one."""
    step = read_step(environment)
    launcher, several = _find_launcher(environment), whole_number(environment, "WORLD_SIZE", default=1)
    if launcher is None and step is not None and step.tasks > 1:
        launcher, several = "srun", step.tasks
    if launcher is not None or several > 1:
        raise ValueError(
            f"`lockstep train` starts its own workers, and {launcher or 'whoever set WORLD_SIZE'} has started {several} of it; "
            "start `python -m launch.train` in its place"
        )
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        refuse_half_set(environment, _PLACE, _WAY_OUT)
    nodes = whole_number(environment, "SLURM_JOB_NUM_NODES", default=1)
    if step is None and nodes > 1 and not one_process:
        raise ValueError(
            f"SLURM_JOB_NUM_NODES={nodes}, and `lockstep train` starts workers on this host alone: start one for each task of "
            "the job with `srun python -m launch.train ...`, or stay on one node with `srun -N 1 -n 1 lockstep train ...`"
        )


def choose_gpu(launch: Launch, visible: int) -> int:
    """The number of this worker's GPU, of those that its process sees. Raises ValueError where there is none for it."""
    if launch.local_rank < visible:
        return launch.local_rank
    if launch.launcher == "srun" and visible == 1:
        return 0  # Slurm has bound a GPU to every task, and hidden the others from it
    raise ValueError(
        f"local rank {launch.local_rank} has no GPU: this process sees {visible}; start fewer workers on this host, "
        "or look at CUDA_VISIBLE_DEVICES"
    )


def _find_launcher(environment: Mapping[str, str]) -> str | None:
    found = [name for name, (mark, _) in _MARKS.items() if mark in environment]
    if len(found) > 1:
        told = " and ".join(f"{name} ({_MARKS[name][0]})" for name in found)
        raise ValueError(f"two launchers at once: {told}; start the workers with one of them")
    if found == ["torchrun"] and _ACCELERATE in environment:
        return "accelerate launch"
    return found[0] if found else None


def _read_place(environment: Mapping[str, str], launcher: str) -> Launch:
    """Raises ValueError for variables that are half set, no numbers, or out of range."""
    refuse_half_set(environment, _PLACE, _WAY_OUT)
    if not environment["MASTER_ADDR"]:
        raise ValueError(f"MASTER_ADDR is empty; {_WAY_OUT}")
    rank, size, local_rank, port = (whole_number(environment, name) for name in _PLACE if name != "MASTER_ADDR")
    if not rank < size:
        raise ValueError(f"RANK={rank} is not below WORLD_SIZE={size}; {_WAY_OUT}")
    local_size = whole_number(environment, "LOCAL_WORLD_SIZE", default=size)
    if not local_rank < local_size:
        name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "WORLD_SIZE"
        raise ValueError(f"LOCAL_RANK={local_rank} is not below {name}={local_size}; {_WAY_OUT}")
    listening = whole_number(environment, LISTENING) if rank == 0 and LISTENING in environment else None
    return Launch(launcher, rank, size, local_rank, environment["MASTER_ADDR"], _checked_port(port), listening)


def _place_in_step(environment: Mapping[str, str], step: SlurmStep) -> Launch:
    address = environment.get("MASTER_ADDR") or meeting_host(environment, step)
    port = whole_number(environment, "MASTER_PORT", default=meeting_port(environment, step))
    return Launch("srun", step.rank, step.tasks, step.local_rank, address, _checked_port(port))


def _checked_port(port: int) -> int:
    if not 0 < port < 2**16:
        raise ValueError(f"MASTER_PORT={port} is no port: 1 to 65535")
    return port


def _refuse_another_step(environment: Mapping[str, str], launch: Launch, step: SlurmStep) -> None:
    """Raises ValueError where a launcher inside a step of several tasks knows nothing of the other tasks."""
    if step.tasks == 1:
        return
    if launch.launcher == BY_HAND:
        if (launch.rank, launch.size) != (step.rank, step.tasks):
            raise ValueError(
                f"two launchers contradict each other: RANK={launch.rank} WORLD_SIZE={launch.size}, and this is {step} "
                "(SLURM_PROCID, SLURM_STEP_NUM_TASKS); unset RANK and WORLD_SIZE, which srun does not need"
            )
        return
    nodes_variable = next(nodes for mark, nodes in _MARKS.values() if mark in environment)
    nodes = 1 if nodes_variable is None else whole_number(environment, nodes_variable, default=1)
    if nodes == 1:
        raise ValueError(
            f"two launchers contradict each other: {launch.launcher} knows of one node, and this is {step}, each of which would "
            f"train a run of its own; tell {launch.launcher} of all nodes, or start each run in a step of one task (srun -n 1)"
        )


def _refuse_one_of_several(environment: Mapping[str, str]) -> None:
    """Raises ValueError for a process that nobody told its place, though there are others of its kind."""
    # `accelerate launch` sets all three only where it was asked for several processes and starts one; where somebody has
    # exported both of the others it looks the same.
    if all(name in environment for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT")):
        raise ValueError(
            "`accelerate launch` was asked for several processes and started one, as it does with --cpu: "
            "give it --multi_gpu (on a CPU too) in place of --cpu, or start with `lockstep train --workers N`; "
            "for one process unset MASTER_ADDR and MASTER_PORT, if it was you who set them"
        )
    for name in _MPI_SIZES:
        if (size := whole_number(environment, name, default=1)) > 1:
            raise ValueError(
                f"{name}={size}: MPI's launchers are not supported; start with torchrun, srun or `lockstep train`, "
                "or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for every process"
            )
