"""`lockstep doctor`: what this machine, or a job's machines, can do, and what of it is slow or broken. Imports no torch: the
workers that it starts do."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.config import DataConfig
from distrib.launchers import Launch, read_launch
from launch.checks import Check, as_table
from launch.config import RunConfig
from launch.disk import look_at_room
from launch.disk_checks import check_rooms, places_in_use
from launch.exit_codes import DONE, FAILED
from launch.run_directory import RUNS

_PACKAGES = ("torch", "deepspeed", "accelerate", "datasets", "wandb", "numpy")
# What launchers and job systems set, and what changes how ranks meet and compute.
_VARIABLES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_ADDR|MASTER_PORT|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS"
    r"|SLURM_(JOB_ID|JOB_NODELIST|NNODES|NTASKS|PROCID|LOCALID|NODEID|GPUS_ON_NODE|RESTART_COUNT)"
    r"|(NCCL|GLOO|TORCHELASTIC|ACCELERATE|DS|DEEPSPEED|FSDP|OMPI_COMM_WORLD|PMI|UCX|TORCH_NCCL)_\w+)"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
_SHOWN_CHARACTERS = 60
_WANDB_SECONDS = 3.0
_WANDB_URL = "https://api.wandb.ai"
# For importing torch, meeting and measuring: only ever reached where something hangs.
_WORKERS_SECONDS = 120.0
_MEETING_SECONDS = 60.0


def examine_machine(config: RunConfig | None, *, workers: int | None, device: str, as_json: bool) -> int:
    """Prints a table, or JSON, of everything that was looked at; returns 1 where something is broken, else 0.

    workers: how many processes measure side by side; None: one per GPU, without a GPU two. Under a launcher, whose processes
    are the workers, it must be None.
    """
    begun = time.monotonic()
    places = _places(config)
    launch = read_launch()
    launched = launch.address is not None
    if launched and workers is not None:
        raise ValueError(
            f"--workers {workers}: a launcher has started this process already (RANK is set); remove one of them"
        )
    if launched:
        speaks, measured = _measure_in_this_process(launch, device, places)
        if not speaks:
            return FAILED if _any_broken(measured) else DONE
    else:
        if workers is None:
            from launch.supervisor import default_workers

            workers = default_workers(device)
        if workers < 1:
            raise ValueError(f"--workers {workers}: must be at least 1")
        measured = _measure_in_workers(workers, device, places)
    checks = [*_versions(), _launcher(os.environ), *measured, *_trackers(config)]
    code = FAILED if _any_broken(checks) else DONE
    seconds = round(time.monotonic() - begun, 1)
    if as_json:
        print(
            json.dumps({"exit_code": code, "seconds": seconds, "checks": [asdict(check) for check in checks]}, indent=2)
        )
    else:
        print(as_table(checks))
        print(f"examined in {seconds} s")
    return code


def _any_broken(checks: Sequence[Check]) -> bool:
    return any(check.state == "broken" for check in checks)


def _places(config: RunConfig | None) -> dict[str, Path]:
    """Where runs are kept, and where shards are cached."""
    directory = (config.run.directory if config is not None else None) or RUNS
    return places_in_use(directory, config.data if config is not None else DataConfig(), always_cache=True)


# --- what needs no torch -----------------------------------------------------------------------------------------------


def _versions() -> list[Check]:
    checks = [Check("python", "ok", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")]
    for name in _PACKAGES:
        try:
            checks.append(Check(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            checks.append(Check(name, "broken", "not installed", f"pip install {name}, or make setup"))
    return checks


def _launcher(environment: Any) -> Check:
    """What launchers have set. Of a variable that may hold a secret only the name."""
    shown = []
    for name in sorted(environment):
        if _VARIABLES.fullmatch(name):
            value = environment[name]
            hidden = _SECRET.search(name) or "://" in value
            shown.append(f"{name} (set, not shown)" if hidden else f"{name}={value[:_SHOWN_CHARACTERS]}")
    return Check("launcher", "ok", " ".join(shown) or "none: no variable of a launcher is set")


def _trackers(config: RunConfig | None) -> list[Check]:
    if config is not None and config.tracking.wandb in ("off", "offline"):
        return [Check("W&B", "ok", f"not asked for (tracking.wandb={config.tracking.wandb})")]
    return [_wandb(os.environ)]


def _wandb(environment: Any) -> Check:
    """Any answer of the server will do: whether the key is right is for W&B to say, when a run begins."""
    url = environment.get("WANDB_BASE_URL") or _WANDB_URL
    host = urlsplit(url).hostname or url  # without a user's name and password
    key = "a key is set" if environment.get("WANDB_API_KEY") else "WANDB_API_KEY is not set"
    begun = time.monotonic()
    try:
        urllib.request.urlopen(url, timeout=_WANDB_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()  # an answer all the same
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error)).split("\n")[0].replace(url, host)
        return Check(
            "W&B", "ok", f"offline: {host} does not answer ({reason}); runs are kept, for `wandb sync` later; {key}"
        )
    return Check("W&B", "ok", f"{host} answers in {time.monotonic() - begun:.2f} s; {key}")


# --- what the workers measure ------------------------------------------------------------------------------------------


def _measure_in_this_process(launch: Launch, device: str, places: Mapping[str, Path]) -> tuple[bool, list[Check]]:
    """As a worker of a launcher: whether this one speaks for all, and what all have found."""
    from distrib.config import ParallelConfig
    from distrib.world import join_world, leave_world
    from launch.examination import examine

    try:
        world = join_world(launch, device, ParallelConfig(timeout_seconds=_MEETING_SECONDS))
    except (ValueError, ConnectionError) as error:
        return True, [Check("workers", "broken", str(error), "see what the launcher sets"), *_rooms_here(places)]
    checks = [*_cuda(), *examine(world, places)]
    speaks = world.rank == 0
    leave_world(world)
    return speaks, checks


def _cuda() -> list[Check]:
    import torch

    if not torch.cuda.is_available():
        return [Check("CUDA", "ok", f"none: torch {torch.__version__} sees no GPU")]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [Check("CUDA", "ok", f"{torch.version.cuda}"), Check("NCCL", "ok", nccl)]


def _measure_in_workers(workers: int, device: str, places: Mapping[str, Path]) -> list[Check]:
    """Starts so many workers on this host; rank 0 tells what they found."""
    context = multiprocessing.get_context("spawn")
    # The workers share the cores, as those of a run do.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    processes: dict[Connection, Any] = {}
    # Rank 0 gets the socket: nobody else can take the port while the workers import torch.
    with socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN) as meeting:
        port = int(meeting.getsockname()[1])
        for rank in range(workers):
            ours, theirs = context.Pipe()
            listening = meeting if rank == 0 else None
            arguments = (theirs, rank, workers, port, listening, device, places)
            processes[ours] = context.Process(target=_work, args=arguments, daemon=True)
            processes[ours].start()
            theirs.close()
    told: dict[int, list[Check] | str] = {}
    ranks = {connection: rank for rank, connection in enumerate(processes)}
    deadline = time.monotonic() + _WORKERS_SECONDS
    failure: str | None = None
    try:
        while failure is None and len(told) < workers:
            waiting = [connection for connection, rank in ranks.items() if rank not in told]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(ranks[connection]) for connection in waiting)
                failure = f"no answer within {_WORKERS_SECONDS:.0f} s from rank {late}"
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    answer = connection.recv()
                except EOFError:
                    processes[connection].join()
                    answer = f"rank {ranks[connection]} ended with code {processes[connection].exitcode}"
                told[ranks[connection]] = answer
                failure = failure or (answer if isinstance(answer, str) else None)
    finally:
        for process in processes.values():
            if failure is not None:
                process.kill()
            process.join()
    if failure is not None:
        broken = Check("workers", "broken", failure, "try --workers 1; what that says is of the machine alone")
        return [broken, *_rooms_here(places)]
    found = told[0]
    assert isinstance(found, list)
    return found


def _rooms_here(places: Mapping[str, Path]) -> list[Check]:
    """Of this host alone, where its workers cannot tell it."""
    return check_rooms({name: {platform.node(): look_at_room(place)} for name, place in places.items()})


def _work(
    connection: Connection,
    rank: int,
    workers: int,
    port: int,
    listening: socket.socket | None,
    device: str,
    places: Mapping[str, Path],
) -> None:
    """A worker's life: as if a launcher had started it."""
    launch = Launch("lockstep doctor")
    if workers > 1:
        descriptor = None if listening is None else listening.detach()
        launch = Launch("lockstep doctor", rank, workers, rank, "127.0.0.1", port, descriptor)
    try:
        connection.send(_measure_in_this_process(launch, device, places)[1])
    except Exception as error:  # told as what is broken, by the process that speaks
        connection.send(
            f"rank {rank}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}"
        )
