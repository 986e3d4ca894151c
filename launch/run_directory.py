"""The directory of a run: claimed by one process at a time, and readable by anyone. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from data.errors import CorruptData
from distrib.manifest import MANIFEST_NAME, TEMPORARY_PREFIX, published_checkpoints, write_durably
from launch.config import RunConfig

RUNS = Path("runs")
STOP_FILE = "stop"
_LAST_THREAD_LOOKS = 200
_LOOK_SECONDS = 0.05
OUTCOME_FILE = "outcome.json"
_VERSIONS = (
    "torch", "accelerate", "numpy", "lockstep", "safetensors", "pyarrow", "tokenizers", "datasets", "wandb", "tensorboard",
)  # fmt: skip
NONE_VERIFIES = "checkpoints exist and none verifies; restore one, or start a new run"


@dataclass(frozen=True)
class Resume:
    """Where a run starts from: a directory, and within it the newest good checkpoint or one that was named."""

    directory: Path | None
    """None: a new numbered directory."""
    from_newest: bool = False
    """Continue from the newest good checkpoint; start fresh only where none was ever published."""
    checkpoint: Path | None = None
    """Start from exactly this checkpoint."""

    @property
    def begins_anew(self) -> bool:
        """Whether there is no run to go on with."""
        known = self.from_newest and self.directory is not None and (self.directory / "run.json").exists()
        return self.checkpoint is None and not known


@dataclass
class RunDirectory:
    """A claimed run directory. `close` gives it up."""

    path: Path
    identity: dict[str, Any]
    lock: IO[str] | None = field(default=None, repr=False)

    @property
    def attempt(self) -> int:
        return len(self.identity["attempts"])

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def forked_from(self) -> str | None:
        """The checkpoint of another run that this one began from."""
        origins = [attempt["resumed_from"] for attempt in self.identity["attempts"] if attempt["resumed_from"]]
        return next((path for path in origins if Path(path).parent.resolve() != self.checkpoints.resolve()), None)

    @property
    def stop_file(self) -> Path:
        return self.path / STOP_FILE

    def write_json(self, name: str, value: Any) -> None:
        write_durably(self.path / name, json.dumps(value, indent=2).encode() + b"\n")

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None


def decide_resume(config: RunConfig, resume: str | None) -> Resume:
    """What `run.directory` and `--resume auto|PATH` ask for. Creates nothing; raises ValueError in one line."""
    directory = config.run.directory
    if resume is None:
        if directory is not None and (directory / "run.json").exists():
            raise ValueError(
                f"run.directory={directory}: already holds a run; continue it with --resume auto, or name another directory"
            )
        return Resume(directory)
    if resume == "auto":
        if directory is None:
            raise ValueError(
                "--resume auto: needs run.directory=DIR (or use --resume DIR) to know which run to continue"
            )
        return Resume(directory, from_newest=True)
    path = Path(resume)
    if (path / MANIFEST_NAME).is_file():
        owner = path.parent.parent
        if directory is None and (owner / "run.json").is_file():
            directory = owner
        elif directory is not None and _holds_other_run(directory, path):
            raise ValueError(f"--resume {path}: run.directory={directory} holds another run; name another directory")
        return Resume(directory, checkpoint=path)
    if (path / "run.json").is_file():
        if directory is not None and directory.resolve() != path.resolve():
            raise ValueError(f"--resume {path} and run.directory={directory}: name two runs; give one of them")
        return Resume(path, from_newest=True)
    raise ValueError(f"--resume {path}: neither a checkpoint (no {MANIFEST_NAME}) nor a run (no run.json); or use auto")


def _holds_other_run(directory: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint may not be continued there: the run is neither its own, nor one that began from it and has yet
    saved nothing."""
    if not (directory / "run.json").exists() or directory.resolve() == checkpoint.parent.parent.resolve():
        return False
    attempts = read_identity(directory)["attempts"]
    origins = {attempt.get("resumed_from") for attempt in attempts}
    return {Path(origin).resolve() for origin in origins if origin} != {checkpoint.resolve()} or ever_checkpointed(
        directory
    )


def read_identity(directory: Path) -> dict[str, Any]:
    """What run.json says. CorruptData where it does not hold what a run writes."""
    path = directory / "run.json"
    try:
        identity = json.loads(path.read_text())
    except (ValueError, RecursionError):
        identity = None
    attempts = identity.get("attempts") if isinstance(identity, dict) else None
    if not isinstance(attempts, list) or not all(isinstance(attempt, dict) for attempt in attempts):
        raise CorruptData(
            f"{path}: not what a run writes; restore the file, or begin a new run from a checkpoint of it"
        )
    assert isinstance(identity, dict)
    return identity


def read_outcome(directory: Path) -> dict[str, Any] | None:
    """What outcome.json says; None where it says nothing of an attempt."""
    try:
        outcome = json.loads((directory / OUTCOME_FILE).read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return outcome if isinstance(outcome, dict) and outcome.keys() >= {"exit_code", "attempt", "pid"} else None


def claim(config: RunConfig, resume: Resume, *, restarted: bool = False) -> RunDirectory:
    """Takes a run directory for this process. Raises ValueError where it cannot be written or another process has it, and
    CorruptData where its run.json is not what a run writes.

    restarted: a supervisor goes on with a run of its own, so that a request to stop it is meant for this attempt too.
    """
    try:
        path = resume.directory or new_numbered(config.run.name)
        (path / "logs").mkdir(parents=True, exist_ok=True)
        # The lock lasts as long as the file stays open, and ends with the process, however it ends.
        lock = (path / "run.lock").open("w")
    except OSError as error:
        raise ValueError(
            f"run directory {error.filename or resume.directory}: cannot be written ({error.strerror}); "
            "set run.directory to a place you may write"
        ) from None
    try:
        _lock(lock)
    except BlockingIOError:
        lock.close()
        raise ValueError(f"run directory {path}: another process is training in it; wait for it or stop it") from None
    if (path / "run.json").exists():
        try:
            identity = read_identity(path)
        except CorruptData:
            lock.close()
            raise
    else:
        run_id = secrets.token_hex(8)
        identity = {
            "name": config.run.name if resume.directory else path.name,
            "run_id": run_id,
            "wandb_run_id": run_id,
            "created": _now(),
            "attempts": [],
        }
    if not restarted:
        (path / STOP_FILE).unlink(missing_ok=True)
    for half_written in path.glob(f"{TEMPORARY_PREFIX}*"):
        half_written.unlink()
    return RunDirectory(path, identity, lock)


def _lock(lock: IO[str]) -> None:
    """Raises BlockingIOError where another process keeps the lock. One that was killed has it until its last thread is gone,
    which may be seconds after it is gone for whoever killed it: no kill ends a flush to a busy disk."""
    # Looks are counted, not seconds: where this process itself stood still, the other one may have stood still as well.
    for _ in range(_LAST_THREAD_LOOKS):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_LOOK_SECONDS)
    return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def begin_attempt(run: RunDirectory, **facts: Any) -> None:
    """Adds an attempt to run.json; before its first step."""
    # An attempt that is killed cannot say how it ended; what an earlier one said must not be taken for its word.
    (run.path / OUTCOME_FILE).unlink(missing_ok=True)
    run.identity["attempts"].append({"attempt": run.attempt + 1, "started": _now(), **facts})
    run.write_json("run.json", run.identity)


def put_end_on_record(path: Path, attempt: int, ended: float) -> None:
    """Says in run.json when an attempt's last worker ended, in seconds since 1970; for who started the workers."""
    with (path / "run.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # somebody else goes on with the run already, and that attempt's beginning is as good
        identity = read_identity(path)
        identity["attempts"][attempt - 1]["time"]["ended"] = round(ended, 6)
        try:
            write_durably(path / "run.json", json.dumps(identity, indent=2).encode() + b"\n")
        except OSError as error:
            print(f"lockstep: warning: {path / 'run.json'}: cannot be written ({error.strerror})", file=sys.stderr)


def ever_checkpointed(path: Path) -> bool:
    """Whether a checkpoint was ever published in this run, good or not."""
    checkpoints = path / "checkpoints"
    return bool(published_checkpoints(checkpoints)) or any(checkpoints.glob("step-*.corrupt*"))


def describe_environment(devices: list[str], world_size: int) -> dict[str, Any]:
    """What a run was made with. No environment variable's value enters, so no secret can."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _VERSIONS},
        "world_size": world_size,
        "devices": devices,
        "cpu_cores": os.cpu_count(),
        "threads_per_worker": os.environ.get("OMP_NUM_THREADS"),
        "git_commit": _git_commit(),
        "command": sys.argv,
    }


def next_numbered(name: str) -> Path:
    """The next numbered directory under `runs/`, which is not made."""
    taken = [int(p.name[len(name) + 1 :]) for p in RUNS.glob(f"{name}-*") if p.name[len(name) + 1 :].isdigit()]
    return RUNS / f"{name}-{max(taken, default=0) + 1:04d}"


def new_numbered(name: str) -> Path:
    """Makes the next numbered directory under `runs/`, which is then nobody else's."""
    RUNS.mkdir(exist_ok=True)
    while True:
        path = next_numbered(name)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of Lockstep's checkout, with a + where files differ from it."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
