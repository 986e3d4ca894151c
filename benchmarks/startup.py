"""How long `lockstep train` takes to its first step, and back to one after a kill, beside a bare script's way there.

    python benchmarks/startup.py [--rounds N] [--output DIRECTORY]

In turn, on data that is prepared: `lockstep --help`; a bare script (startup_bare.py) on two processes, from its start until
model and optimizer are built; `lockstep train` of the default recipe with two workers, from its start until the last of
them begins the first step, once the evaluation before it is over; and from the death of one of them by SIGKILL until the
last worker of the next attempt begins its first step. What workers do and when, they tell as their phases begin. Medians of
the rounds count, and ratios are taken within a round.

Beside the seconds stand those that the cores worked for it, one after the other: of the supervisor until it has started
workers, and of the worker that took most, which has a core of its own where nothing else runs. Foreign load adds little to
them, while it may multiply the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe_machine, measured
from launch.recipe import load_recipe

RECIPE, WORKERS = "gpt-stdlib", 2
LIMIT_SECONDS = 600.0  # only ever reached where something hangs
LOCKSTEP = str(Path(sys.executable).parent / "lockstep")
QUIET = [
    "tracking.wandb=off",
    "run.max_restarts=3",
    "run.steps=100000",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=null",
]
MOST_RATIO, MOST_HELP_SECONDS, MOST_RECOVERY_SECONDS = 1.5, 0.5, 5.0
# Python runs a module of this name in every process at its start: a worker tells when each of its phases begins.
SITE = """
import os, time

if "RANK" in os.environ and "HEARD" in os.environ:
    from distrib.phases import observe
    heard = open(os.path.join(os.environ.pop("HEARD"), f"{os.environ['RANK']}-{os.getpid()}"), "w", buffering=1)
    observe(lambda moment: moment.saving or print(time.monotonic(), time.process_time(), moment.phase, file=heard))
"""


class Start(NamedTuple):
    """What a worker did until its first step: when it began to read a checkpoint, had read it, began to evaluate (None: it
    did not) and to take the first step's batch, and began the step. In seconds of the clock, or of its own work."""

    load: float
    loaded: float
    evaluate: float | None
    data: float
    forward: float


def read_start(path: Path, *, work: bool) -> Start | None:
    """None while a worker has not come to its first step."""
    first: dict[str, float] = {}
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        clock, worked, phase = line.split()
        when = worked if work else clock
        name = "loaded" if phase == "start" and "load" in first else phase
        first.setdefault(name, float(when))
        if name == "forward":
            return Start(first["load"], first["loaded"], first.get("evaluate"), first["data"], first["forward"])
    return None


def time_help() -> float:
    begun = time.monotonic()
    subprocess.run([LOCKSTEP, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def time_bare(environment: Mapping[str, str]) -> tuple[float, float]:
    """Until the last of the processes has built model and optimizer; and the most that one of them worked for it."""
    recipe = load_recipe(RECIPE)
    model: Any = recipe.model
    sizes = [model.layers, model.width, model.heads, 2048, recipe.batch.global_samples, recipe.data.sequence_tokens]
    command = [sys.executable, str(Path(__file__).with_name("startup_bare.py")), *map(str, sizes)]
    port = _free_port()
    begun = time.monotonic()
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORKERS)
    ]  # fmt: skip
    worked = []
    for rank in ranks:
        assert rank.stdout is not None
        worked.append(float(rank.stdout.readline().removeprefix("built ")))
    built = time.monotonic() - begun
    for rank in ranks:
        rank.communicate(timeout=LIMIT_SECONDS)
        assert rank.returncode == 0
    return built, max(worked)


def time_train(place: Path, environment: Mapping[str, str], number: int) -> dict[str, float]:
    """A run's start, and its recovery from the death of rank 1."""
    heard, run = place / f"heard-{number}", place / f"run-{number}"
    heard.mkdir()
    command = [LOCKSTEP, "train", RECIPE, f"run.directory={run}", "--workers", str(WORKERS), *QUIET]
    begun = time.monotonic()
    with _started(command, place, {**environment, "HEARD": str(heard)}) as supervisor:
        _wait_until(lambda: len(list(heard.iterdir())) == WORKERS, "the workers")
        supervisor_worked = _worked(supervisor.pid)
        first, first_work = _wait_for_starts(heard, set())
        known = set(heard.iterdir())
        _wait_until(lambda: bool(list((run / "checkpoints").glob("step-*"))), "a checkpoint")
        [rank_one] = [path for path in known if path.name.startswith("1-")]
        killed = time.monotonic()
        os.kill(int(rank_one.name.partition("-")[2]), signal.SIGKILL)
        again, again_work = _wait_for_starts(heard, known)
        supervisor.send_signal(signal.SIGINT)
        supervisor.wait(LIMIT_SECONDS)
    evaluation = max(start.data - (start.evaluate or start.data) for start in first)
    restore = max(start.loaded - start.load for start in again)
    recovery = max(start.forward for start in again) - killed
    return {
        "first_step": max(start.forward for start in first) - begun - evaluation,
        "first_step_work": supervisor_worked
        + max(start.forward - (start.data - (start.evaluate or start.data)) for start in first_work),
        "evaluation": evaluation,
        "recovery": recovery - restore,
        "recovery_work": max(start.forward - (start.loaded - start.load) for start in again_work),
        "restore": restore,
    }


def _worked(pid: int) -> float:
    """Seconds that a process has kept cores busy."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _wait_for_starts(heard: Path, known: set[Path]) -> tuple[list[Start], list[Start]]:
    """By the clock and in work, of the workers that were not known before, once all of them have begun a step."""

    def starts(*, work: bool) -> list[Start]:
        found = [read_start(path, work=work) for path in set(heard.iterdir()) - known]
        return [start for start in found if start is not None]

    _wait_until(lambda: len(starts(work=False)) == WORKERS, "the first step")
    return starts(work=False), starts(work=True)


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"never came: {what}")
        time.sleep(0.005)


@contextmanager
def _started(command: list[str], place: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (place / "output").open("ab") as output:
        process = subprocess.Popen(command, cwd=place, env=dict(environment), stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def summarise(rounds: list[dict[str, float]], load_average: float) -> dict[str, Any]:
    """Median, least and most of everything, and whether the medians are what was aimed at. What the clock says decides
    nothing where other programs wanted the cores too."""
    spread = {
        name: {
            "median": statistics.median(one[name] for one in rounds),
            "min": min(one[name] for one in rounds),
            "max": max(one[name] for one in rounds),
        }
        for name in rounds[0]
    }
    most = {"help": MOST_HELP_SECONDS, "ratio": MOST_RATIO, "recovery": MOST_RECOVERY_SECONDS}
    most |= {"ratio_work": MOST_RATIO, "recovery_work": MOST_RECOVERY_SECONDS}
    verdicts = {name: "met" if spread[name]["median"] <= limit else "missed" for name, limit in most.items()}
    if load_average > 1.0:
        verdicts |= {name: "undecided, the machine was busy" for name in verdicts if not name.endswith("_work")}
    return {"rounds": rounds, "spread": spread, "targets": most, "verdicts": verdicts}


MEANING = {
    "help": "`lockstep --help`, seconds",
    "bare": "bare script: imports and build, seconds",
    "bare_work": "the same, seconds of work",
    "first_step": "`lockstep train` to the first step, seconds, without the evaluation before it",
    "first_step_work": "the same, seconds of work",
    "ratio": "`lockstep train` over the bare script, seconds",
    "ratio_work": "the same, seconds of work",
    "evaluation": "the recipe's evaluation before the first step, seconds",
    "recovery": "from a rank's SIGKILL to the next attempt's first step, seconds, without the restore",
    "recovery_work": "the same, seconds of work",
    "restore": "the restore, seconds",
}


def as_markdown(machine: dict[str, Any], summary: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# Startup and recovery",
        "",
        f"{measured(machine)} Recipe {RECIPE}, {WORKERS} workers, {len(summary['rounds'])} rounds.",
        "",
        "| | median | least to most | target |",
        "|---|---:|---|---|",
    ]
    for name, meaning in MEANING.items():
        spread, most = summary["spread"][name], summary["targets"].get(name)
        target = "" if most is None else f"at most {most:g}: {summary['verdicts'][name]}"
        lines.append(f"| {meaning} | {spread['median']:.2f} | {spread['min']:.2f} to {spread['max']:.2f} | {target} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints the table and writes `startup.json` and `startup.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "sitecustomize.py").write_text(SITE)
        path = os.pathsep.join([directory, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        prepare = [
            LOCKSTEP,
            "train",
            RECIPE,
            "run.steps=1",
            "schedule.warmup_steps=0",
            "tracking.wandb=off",
            "evaluation.samples=1",
        ]
        subprocess.run(prepare, cwd=place, env=environment, check=True, capture_output=True)
        rounds = []
        for number in range(options.rounds):
            bare, bare_work = time_bare(environment)
            train = time_train(place, environment, number)
            ratios = {"ratio": train["first_step"] / bare, "ratio_work": train["first_step_work"] / bare_work}
            rounds.append({"help": time_help(), "bare": bare, "bare_work": bare_work, **ratios, **train})
            print(rounds[-1], file=sys.stderr, flush=True)
    summary = summarise(rounds, machine["load_average_before"])
    text = as_markdown(machine, summary)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "startup.json").write_text(json.dumps({"machine": machine, **summary}, indent=1) + "\n")
    (options.output / "startup.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
