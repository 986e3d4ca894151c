"""What the end-to-end tests share: a tiny corpus and recipe, real commands, and reading a run's directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.tracking.metrics_file import read_metrics

LOCKSTEP = str(Path(sys.executable).parent / "lockstep")
# Only ever reached where something hangs.
TIMEOUT_SECONDS = 200.0
_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_SIZE",
)
_LAUNCHER_PREFIXES = ("SLURM", "TORCHELASTIC_", "ACCELERATE_", "OMPI_", "PMI_", "LOCKSTEP_")
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "two",
    "dogs",
    "ran",
    "over",
    "green",
    "hills",
    "and",
    "slept",
)


def write_corpus(directory: Path, documents: int = 60, seed: int = 7) -> Path:
    """Text files of random sentences, the same on every machine."""
    directory.mkdir(parents=True)
    choose = random.Random(seed)
    for number in range(documents):
        text = " ".join(choose.choice(WORDS) for _ in range(120))
        (directory / f"document-{number:02d}.txt").write_text(text + "\n")
    return directory


def tiny_gpt(dataset: Path, corpus: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose steps take a few milliseconds, with dropout; `sections` change or add keys."""
    recipe: dict[str, Any] = {
        "run": {"name": "tiny", "steps": 40, "max_restarts": 0},
        "model": {"kind": "transformer", "layers": 2, "width": 32, "heads": 2, "dropout": 0.1},
        "task": {"kind": "language_modelling"},
        "data": {
            "source": f"text:{corpus}",
            "directory": str(dataset),
            "sequence_tokens": 64,
            "validation_fraction": 0.2,
        },
        "batch": {"global_samples": 12, "micro_samples": 2},
        "optimizer": {"lr": 1.0e-3},
        "checkpoint": {"every_steps": 5},
        "evaluation": {"samples": 8, "prompt": "the cat"},
        "tracking": {"wandb": "off", "tensorboard": False},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    return recipe


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


def environment(**extra: str) -> dict[str, str]:
    """The tests' own environment without a launcher's variables, with one thread a process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


@dataclass(frozen=True)
class Result:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> list[str]:
        """The lines on stderr that speak to the user: what our own command or worker says at its end."""
        return [line for line in self.err.splitlines() if line.startswith("lockstep: ")]

    def failed_with(self, code: int, *parts: str) -> str:
        """Asserts the exit code and exactly one line of explanation, which holds `parts`; returns that line."""
        assert self.code == code, f"exit code {self.code} instead of {code}:\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        assert len(self.told) == 1, self.err
        for part in parts:
            assert part in self.told[0], f"{part!r} is not in {self.told[0]!r}"
        return self.told[0]

    def succeeded(self) -> Result:
        assert self.code == 0, f"exit code {self.code}:\n{self.out}\n{self.err}"
        return self


def command(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None) -> Result:
    """Runs a command to its end."""
    with started(*arguments, cwd=cwd, env=env) as process:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    return Result(process.returncode, out, err)


def side_by_side(
    commands: Sequence[Sequence[object]], *, cwd: Path, envs: Sequence[Mapping[str, str] | None]
) -> list[Result]:
    """Runs several commands at once, as the nodes of a cluster do, to their ends."""
    with ThreadPoolExecutor(len(commands)) as threads:
        return list(threads.map(lambda words, env: command(*words, cwd=cwd, env=env), commands, envs))


def srun_variables(tasks_per_node: Sequence[int], job: int, **extra: str) -> list[dict[str, str]]:
    """What `srun` (Slurm 22.05) sets for each task of the first step of a job, on nodes that are all this host."""
    nodes, tasks = len(tasks_per_node), sum(tasks_per_node)
    places = [(node, task) for node, here in enumerate(tasks_per_node) for task in range(here)]
    listed = f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1"
    return [
        {
            "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": listed, "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NNODES": str(nodes), "SLURM_NODEID": str(node), "SLURMD_NODENAME": f"127.0.0.{node + 1}",
            "SLURM_NTASKS": str(tasks), "SLURM_NPROCS": str(tasks), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(task),
            "SLURM_STEPID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": listed, "SLURM_STEP_NUM_NODES": str(nodes),
            "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, tasks_per_node)), **extra,
        }
        for rank, (node, task) in enumerate(places)
    ]  # fmt: skip


def lockstep(*arguments: object, cwd: Path, **keywords: Any) -> Result:
    """Runs the `lockstep` command to its end."""
    return command(LOCKSTEP, *arguments, cwd=cwd, **keywords)


class WarmProcess:
    """Runs our commands as children of a process that has imported everything, see warm_process.py."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        script = Path(__file__).with_name("warm_process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            # Arrow's own allocator would start a thread.
            env=environment(ARROW_DEFAULT_MEMORY_POOL="system"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def worker(self, *arguments: object, **keywords: Any) -> Result:
        """`python -m launch.train ...`, alone. Keywords: cwd, env, and limits such as `{resource.RLIMIT_FSIZE: 4096}`."""
        return self._run("launch.train", arguments, **keywords)

    def lockstep(self, *arguments: object, **keywords: Any) -> Result:
        """`lockstep ...`; for `train`, which starts processes itself, this wins nothing."""
        return self._run("launch.cli", arguments, **keywords)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _run(
        self,
        module: str,
        arguments: Sequence[object],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        limits: Mapping[int, int] | None = None,
    ) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, err = self._directory / "out", self._directory / "err"
        for path in (out, err):
            path.write_bytes(b"")
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "environment": dict(env if env is not None else environment()),
            "limits": list((limits or {}).items()),
            "out": str(out),
            "err": str(err),
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Result(int(self._process.stdout.readline()), out.read_text(), err.read_text())


@contextlib.contextmanager
def started(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, as a terminal would start it; it and its workers are gone at the end."""
    process = subprocess.Popen(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=dict(env if env is not None else environment()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *workers_of(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def workers_of(supervisor: int) -> list[int]:
    """Process ids of the workers that a `lockstep train` has started, by rank."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            words = (stat.parent / "cmdline").read_bytes().split(b"\0")
            if parent == supervisor and b"launch.train" in words:
                # One that has ended since has no environment any more.
                found += [(rank, int(stat.parent.name)) for rank in _ranks(stat.parent)]
    return [pid for _, pid in sorted(found)]


def _ranks(process: Path) -> list[int]:
    variables = (process / "environ").read_bytes().split(b"\0")
    return [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str, seconds: float = TIMEOUT_SECONDS) -> None:
    """Polls until `condition()` holds; the limit only ends a test that would hang."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.001)


def wait_for_step(run: Path, step: int, attempt: int | None, process: subprocess.Popen[str]) -> None:
    """Polls until a run has recorded `step` (in its attempt `attempt`, where given) or its process has ended."""

    def reached() -> bool:
        recorded = [r["step"] for r in read_metrics(run)[0] if attempt is None or r["attempt"] == attempt]
        return process.poll() is not None or max(recorded, default=0) >= step

    wait_until(reached, f"step {step} of {run}")


def checkpoints(run: Path) -> list[str]:
    """Names of the published checkpoints, oldest first."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*[0-9]"))


def newest_step(run: Path) -> int:
    """The step of the newest published checkpoint; 0 where there is none."""
    return max((int(name.removeprefix("step-")) for name in checkpoints(run)), default=0)


def stop_beyond_a_checkpoint(
    process: subprocess.Popen[str], run: Path, attempt: int, *, saved: int, steps: int
) -> list[int]:
    """Makes a run and its workers stand still (SIGSTOP) where a checkpoint of step `saved` or later is published, and `steps`
    steps or more that come after the newest are recorded. How far the thread that saves is behind the one that trains is up to
    chance, and whoever looks and then kills comes later than they looked. Returns the workers' process ids, by rank."""

    def far_enough() -> bool:
        recorded = max((r["step"] for r in read_metrics(run)[0] if r["attempt"] == attempt), default=0)
        return newest_step(run) >= saved and recorded >= newest_step(run) + steps

    while True:
        wait_until(lambda: process.poll() is not None or far_enough(), f"{steps} steps of {run} beyond a checkpoint")
        assert process.poll() is None, "the run ended by itself"
        workers = workers_of(process.pid)
        _stop([process.pid, *workers])
        if far_enough():
            return workers
        for pid in [process.pid, *workers]:
            os.kill(pid, signal.SIGCONT)


def _stop(processes: Sequence[int]) -> None:
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(map(_stands_still, processes)), "a stop of all threads")


def _stands_still(pid: int) -> bool:
    """Whether every thread of a process is stopped: a signal reaches one after the other, and not within a write to disk."""
    try:
        states = {stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")}
    except OSError:  # a thread has ended meanwhile
        return False
    return states == {"T"}


def final_bytes(run: Path) -> dict[str, str]:
    """sha256 of every weights and optimizer file of the newest checkpoint."""
    newest = run / "checkpoints" / checkpoints(run)[-1]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safetensors")}
    assert any(name.startswith("model-") for name in files)
    assert any(name.startswith("optimizer-") for name in files)
    return files


def history(run: Path) -> list[tuple[Any, ...]]:
    """What every step was: step, samples, tokens, loss, learning rate, gradient norm, skipped, digest."""
    keys = ("step", "samples", "tokens", "loss", "lr", "gradient_norm", "skipped", "digest")
    return [tuple(record[key] for key in keys) for record in read_metrics(run)[0]]


def digests(run: Path) -> list[str]:
    return [record["digest"] for record in read_metrics(run)[0]]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)[0]]
