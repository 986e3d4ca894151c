"""What Slurm says to a process: whether `srun` started it, its place among the step's tasks, and where these can meet.

As Slurm 22.05 sets them: a task of `srun` has SLURM_STEP_*, while a batch script and a shell of `salloc` have variables of
the job alone, and SLURM_NTASKS there is what the job asked for, not what runs. SLURM_STEP_NUM_TASKS is true in every step, that
of an interactive `salloc` (one task, whatever SLURM_NTASKS says) included. Imports no torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distrib.variables import refuse_half_set, whole_number

_STEP_VARIABLES = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
# Below the ports that Linux gives out by itself.
_FIRST_PORT, _PORTS = 15000, 16381
# Apart by enough that 250 jobs with ids in a row, 8 steps and 7 restarts of each take ports of their own.
_STEP_STRIDE, _RESTART_STRIDE = 257, 2063


@dataclass(frozen=True)
class SlurmStep:
    """A task of `srun`, and the step that it belongs to."""

    rank: int
    tasks: int
    local_rank: int
    job: int
    step: int

    def __str__(self) -> str:
        return f"task {self.rank} of {self.tasks} of Slurm's step {self.job}.{self.step}"


def read_step(environment: Mapping[str, str]) -> SlurmStep | None:
    """The step that this process is a task of, None where `srun` did not start it. Raises ValueError for half-set variables
    and for those of two steps."""
    if not any(name.startswith("SLURM_STEP_") for name in environment):
        return None
    refuse_half_set(environment, _STEP_VARIABLES, "start with srun, or unset Slurm's variables")
    rank, tasks, local_rank, job, step = (
        whole_number(environment, name)
        for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    if not rank < tasks:
        raise ValueError(f"SLURM_PROCID={rank} is not below SLURM_STEP_NUM_TASKS={tasks}; start with srun")
    if tasks > 1 and whole_number(environment, "SLURM_NTASKS", default=tasks) != tasks:
        raise ValueError(
            f"Slurm's variables are of two steps: SLURM_STEP_NUM_TASKS={tasks}, SLURM_NTASKS={environment['SLURM_NTASKS']}; "
            "a job that was submitted from within a step inherits its variables: start with srun, or unset SLURM_STEP_*"
        )
    return SlurmStep(rank, tasks, local_rank, job, step)


def refuse_job_without_step(environment: Mapping[str, str]) -> None:
    """Raises ValueError for one process, outside of any step, where its job has room for several: the rest would stand idle."""
    if "SLURM_JOB_ID" not in environment:
        return
    for name, several in (("SLURM_NTASKS", "tasks"), ("SLURM_JOB_NUM_NODES", "nodes")):
        if (count := whole_number(environment, name, default=1)) > 1:
            raise ValueError(
                f"{name}={count}, but srun did not start this process, which would train alone: start a worker for each of "
                f"the job's {several} with `srun python -m launch.train ...`, or this one alone with `srun -N 1 -n 1 ...`"
            )


def meeting_host(environment: Mapping[str, str], step: SlurmStep) -> str:
    """The step's first node, on which its rank 0 is expected. Raises ValueError where that runs elsewhere."""
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
    if name not in environment:
        raise ValueError(
            "launcher variables are half set: SLURM_STEP_NUM_TASKS without SLURM_STEP_NODELIST; set MASTER_ADDR to rank 0's host"
        )
    try:
        first = next(expand_node_list(environment[name]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; set MASTER_ADDR to rank 0's host") from None
    here = environment.get("SLURMD_NODENAME", first)
    if step.rank == 0 and here != first:
        raise ValueError(
            f"rank 0 runs on {here}, and {first} is the first of {name}={environment[name]}, where the others look for it; "
            f"set MASTER_ADDR={here}, or leave out srun's --distribution"
        )
    return first


def meeting_port(environment: Mapping[str, str], step: SlurmStep) -> int:
    """A port that is the same for all tasks of a step, and another one for its neighbours on the same host."""
    restart = whole_number(environment, "SLURM_RESTART_COUNT", default=0)
    return _FIRST_PORT + (step.job + _STEP_STRIDE * step.step + _RESTART_STRIDE * restart) % _PORTS


def expand_node_list(text: str) -> Iterator[str]:
    """The nodes that Slurm writes as `n[1-3,07],login`, in order, as `scontrol show hostnames` gives them. Raises ValueError."""
    word = r"(?:[^\s,\[\]]|\[[^\s\[\]]+\])+"
    if not re.fullmatch(rf"{word}(?:,{word})*", text):
        raise ValueError(f"{text!r} is no list of nodes")
    for name in re.findall(word, text):
        # Every second part stood in brackets.
        parts = re.split(r"\[([^\]]+)\]", name)
        yield from map("".join, itertools.product(*([p] if n % 2 == 0 else _numbers(p) for n, p in enumerate(parts))))


def _numbers(ranges: str) -> list[str]:
    """`1-3,07` is 1, 2, 3, 07: numbers are as wide as a range's first one."""
    found: list[str] = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"[{ranges}] is no list of numbers and ranges of them")
        found += [str(n).zfill(len(match[1])) for n in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return found
