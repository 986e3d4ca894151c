"""Runs a case: starts the same command again as long as the run asks for it, then holds it to its outcome.

Faults come from injector.py, inside the workers. Whatever a case was about, nothing may be left of it: no process, no
half-written file.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.config import DataConfig
from data.prepare import prepare
from launch.exit_codes import DO_NOT_RESTART, DONE, FAILED, STOPPED_EARLY
from launch.tracking.metrics_file import read_metrics
from launch.tracking.writer import ORPHAN_SECONDS
from tests.chaos.launching import Launcher, wait_for_end
from tests.chaos.plan import (
    ASKING_TO_STOP,
    SAVE_EVERY_STEPS,
    STEPS,
    WORLD_SIZE,
    Case,
    Happening,
    cache_place,
    checkpoints_place,
    comes_too_late,
    dataset_place,
    run_place,
)
from tests.data.faulty_server import serving
from tests.end_to_end.runs import (
    checkpoints,
    final_bytes,
    history,
    tiny_gpt,
    wait_until,
    write_corpus,
    write_recipe,
)
from tests.launch.silent_server import silent_server

SMALL_DISK_BYTES = 16 << 20
_MOST_LAUNCHES = 8
FAKE_KEY = "x" * 40


@dataclass(frozen=True)
class Launched:
    """One start of the run's command, and how it ended."""

    exit_code: int
    """Negative for a signal."""
    attempts: int
    """How many attempts it has begun."""
    said: str
    happened: bool
    """Whether what the case is about came while it ran."""


@dataclass(frozen=True)
class Told:
    """What a case came to."""

    happened: bool
    """Whether its fault has come about."""
    restarts: int
    exit_codes: tuple[int, ...]
    """Of every start of the run's command, in their order."""
    recovery_seconds: float | None
    """From the fault to the end of the first step after it; None where no process had to start again."""
    seconds: float
    said: str
    """All that its commands have printed, and the logs of the ranks: what befalls any of several is told by the one it met."""


class Ground:
    """What all cases share: the dataset, the recipe and the runs that nothing disturbs."""

    def __init__(self, directory: Path, launcher: Launcher) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.launcher = launcher
        self._cold = Launcher()
        corpus = write_corpus(directory / "texts", documents=20)
        self.values = tiny_gpt(
            directory / "dataset",
            corpus,
            run={"steps": STEPS},
            model={"layers": 1, "width": 32},
            # The order in which remote data is read, too.
            data={"sequence_tokens": 32, "order": "windowed", "lanes": 2, "window_shards": 2},
            batch={"global_samples": 6, "micro_samples": 2},
            checkpoint={"every_steps": SAVE_EVERY_STEPS},
            evaluation={"samples": 4},
        )
        prepare(DataConfig.model_validate(self.values["data"]))
        self._undisturbed: dict[str, Path] = {}

    def launcher_for(self, case: Case) -> Launcher:
        """Where the launcher reads a remote dataset, its sockets and threads would be in its forked workers, too."""
        return self._cold if case.remote else self.launcher

    def undisturbed(self, *happenings: Happening) -> Path:
        """The run that nothing disturbs; or in which only this happens, all of it before the end of its first attempt."""
        key = str(happenings)
        if key not in self._undisturbed:
            directory = self.directory / f"undisturbed-{len(self._undisturbed)}"
            site = CaseSite(self, directory, Case("none", happenings, "identical"))
            with site.ready():
                assert site.launch() == DONE, site.said()
            self._undisturbed[key] = site.run
        return self._undisturbed[key]


class CaseSite:
    """The directories of a case, and its commands."""

    def __init__(self, ground: Ground, directory: Path, case: Case) -> None:
        self.ground, self.case, self.directory = ground, case, directory
        self.launcher = ground.launcher_for(case)
        self.run = run_place(directory)
        self.dataset = dataset_place(directory)
        self.cache = cache_place(directory)
        self.temporary = directory / "temporary"
        self.chaos = directory / "chaos"
        self.commands = 0
        self.launches: list[Launched] = []
        self.shared_memory: set[Path] = set()
        self._recipe = directory / "recipe.yaml"
        # torch keeps a cache for all of a user's processes, which would be taken for something left behind.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(directory / "torch-cache")}
        self._env = {"CHAOS": str(self.chaos), "TMPDIR": str(self.temporary), **cache}

    @property
    def small_disk(self) -> Path:
        return self.run if self.case.small_disk == "run" else checkpoints_place(self.directory)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Everything that the case needs, until the end of the block; afterwards no process of it is there."""
        for folder in (self.temporary, self.chaos):
            folder.mkdir(parents=True)
        shutil.copytree(self.ground.directory / "dataset", self.dataset)
        plan = [asdict(happening) for happening in self.case.happenings]
        (self.chaos / "plan.json").write_text(json.dumps(plan))
        values = {**self.ground.values, "data": {**self.ground.values["data"], "directory": str(self.dataset)}}
        with contextlib.ExitStack() as stack:
            if self.case.small_disk is not None:
                stack.enter_context(_disk(self.small_disk))
            if self.case.remote:
                address = stack.enter_context(serving(self.dataset)).address
                values["data"] |= {"directory": address, "cache_directory": str(self.cache)}
            if self.case.hung_tracker:
                url = stack.enter_context(silent_server())[0]
                values["tracking"] = {**values["tracking"], "wandb": "online"}
                self._env |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": FAKE_KEY}
            write_recipe(self._recipe, values)
            stack.callback(self.launcher.kill_what_is_left)
            yield

    def launch(self, *overrides: str) -> int:
        """Starts the run, or goes on with it; returns the exit code, negative for a signal."""
        if self.case.fault == "SIGSTOP of a rank":
            overrides = (*overrides, "run.hang_timeout_seconds=2")
        asked = [f"run.directory={self.run}", *overrides, "--resume", "auto", "--workers", WORLD_SIZE]
        attempts, happened = self.attempts, bool(self.happened(self.case.main))
        code = self.command("train", self._recipe, *asked)
        said = "".join(path.read_text() for path in self._outputs())
        happened = not happened and bool(self.happened(self.case.main))
        self.launches.append(Launched(code, self.attempts - attempts, said, happened))
        return code

    @property
    def began_an_attempt(self) -> bool:
        return self.launches[-1].attempts > 0

    @property
    def attempts(self) -> int:
        known = self.run / "run.json"
        return len(json.loads(known.read_text())["attempts"]) if known.exists() else 0

    def command(self, *arguments: object) -> int:
        self.commands += 1
        out, err = self._outputs()
        started = self.launcher.start(*arguments, cwd=self.directory, env=self._env, out=out, err=err)
        wake = "SIGCONT" in self.case.fault
        return wait_for_end(started, self.launcher, self.shared_memory, wake_stopped=wake)

    def _outputs(self) -> list[Path]:
        """Where the last command prints to."""
        return [self.directory / f"command-{self.commands}.{kind}" for kind in ("out", "err")]

    def launch_until_done(self) -> int:
        """The same command again as long as the run asks for it or was killed; the exit code that ends that."""
        for _ in range(_MOST_LAUNCHES):
            code = self.launch()
            if code not in (FAILED, STOPPED_EARLY) and code >= 0:
                return code
        raise AssertionError(f"still exit code {code} after {_MOST_LAUNCHES} starts\n{self.said()}")

    def said(self) -> str:
        """All that the commands have printed."""
        return "\n".join(path.read_text() for path in sorted(self.directory.glob("command-*")))

    def happened(self, number: int) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.chaos.glob(f"happened-{number}-*"))]


def run_case(ground: Ground, directory: Path, case: Case, *, patience_seconds: float | None = None) -> Told:
    """Runs a case to its end and holds it to its outcome; AssertionError says where it differs, and all that was printed.
    `patience_seconds`: how long what is left of its processes may take to end."""
    if patience_seconds is None:
        # A tracker whose trainer was killed has so long for what it was given before.
        patience_seconds = ORPHAN_SECONDS + 60.0 if case.hung_tracker else 60.0
    site = CaseSite(ground, directory, case)
    begun = time.monotonic()
    with site.ready():
        try:
            _hold_to_outcome(site)
            wait_until(lambda: not site.launcher.processes(), "the end of all processes", seconds=patience_seconds)
            assert _left_over(site) == [], f"left over: {_left_over(site)}"
        except AssertionError as error:
            raise AssertionError(f"{case}\n{error}\n{site.said()}") from error
        happened = site.happened(case.main)
        restarts = site.attempts - 1
        logs = [path.read_text() for path in sorted((site.run / "logs").glob("rank-*.log"))]
        said = "\n".join([site.said(), *logs])
        worked = [json.loads(path.read_text()) for path in site.chaos.glob("worked-*")]
    at = min((record["time"] for record in happened), default=math.inf)
    after = [record["time"] for record in worked if record["begun"] > at and case.outcome == "identical"]
    return Told(
        happened=bool(happened),
        restarts=restarts,
        exit_codes=tuple(launched.exit_code for launched in site.launches),
        recovery_seconds=min(after) - at if after else None,
        seconds=time.monotonic() - begun,
        said=said,
    )


def _hold_to_outcome(site: CaseSite) -> None:
    case, ground = site.case, site.ground
    straight = ground.undisturbed()
    code = site.launch_until_done()
    if case.fault in ASKING_TO_STOP:
        _hold_to_stopped(site)
    if case.outcome == "78, then identical" and site.happened(case.main):
        assert code == DO_NOT_RESTART, f"exit code {code} instead of 78"
        # There is none where nothing can be written, and an older one where the command ended before there was an attempt.
        outcome = json.loads(path.read_text()) if (path := site.run / "outcome.json").exists() else None
        if outcome is not None and site.began_an_attempt:
            assert outcome["exit_code"] == DO_NOT_RESTART, outcome
        if checkpoints(site.run):
            assert site.command("checkpoint", "verify", site.run) == DONE
        # What a kill before has left goes when an attempt begins, and not all that end with 78 come to that.
        assert _left_over(site) == [] or not site.began_an_attempt, f"left over after 78: {_left_over(site)}"
        _mend(site)
        code = site.launch_until_done()
    assert code == DONE, f"exit code {code} instead of 0"
    steps = [record["step"] for record in read_metrics(site.run)[0]]
    assert steps == list(range(1, STEPS + 1))
    if case.outcome == "skipped":
        _hold_to_skipped(site, straight)
    else:
        assert history(site.run) == history(straight)
        assert final_bytes(site.run) == final_bytes(straight)
    assert site.command("data", "audit", site.run) == DONE, "the audit proves it not"
    assert site.command("checkpoint", "verify", site.run) == DONE


def _hold_to_stopped(site: CaseSite) -> None:
    """A rank that was asked to stop is no rank that died: all of them end together, once everything is saved."""
    for launched in (launched for launched in site.launches if launched.happened):
        if launched.exit_code == DONE and comes_too_late(site.case.happenings[site.case.main]):
            continue
        assert launched.exit_code == STOPPED_EARLY, f"exit code {launched.exit_code} of what was asked to stop, not 75"
        assert launched.attempts == 1, f"{launched.attempts} attempts in a start that was asked to stop"
        assert "; everything is saved" in launched.said, "nothing was said of what is saved"


def _hold_to_skipped(site: CaseSite, straight: Path) -> None:
    """The step is skipped, and nothing else: as in the run whose gradient is not a number there on all ranks."""
    [(step, *_)] = {(record["step"] + 1, record["phase"]) for record in site.happened(0)}
    steps = read_metrics(site.run)[0]
    assert [record["step"] for record in steps if record["skipped"]] == [step]
    assert f"step {step}: skipped, its gradient is not finite" in site.said()
    assert history(site.run)[: step - 1] == history(straight)[: step - 1]
    assert [record["digest"] for record in steps] == [record["digest"] for record in read_metrics(straight)[0]]
    oracle = site.ground.undisturbed(Happening("reduce", step - 1, None, [("poison", {})]))
    assert final_bytes(site.run) == final_bytes(oracle)
    assert final_bytes(site.run) != final_bytes(straight)


def _mend(site: CaseSite) -> None:
    """What a person does who has read why the run ended."""
    if site.case.small_disk is not None:
        subprocess.run(["mount", "-o", "remount,rw", str(site.small_disk)], check=True)
        (site.small_disk / "balloon").unlink(missing_ok=True)
    for original in (site.ground.directory / "dataset").iterdir():
        shutil.copy2(original, site.dataset / original.name)


def _left_over(site: CaseSite) -> list[str]:
    """What should have been removed: half-written files of the run and of the cache, temporary ones, shared memory."""
    found = [*site.run.rglob(".tmp-*"), *site.temporary.iterdir()]
    found += (site.cache / "partial").glob("*")
    found += [path for path in site.shared_memory if path.exists()]
    return sorted(map(str, found))


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """A small disk of its own, which only root may mount."""
    folder.mkdir(parents=True)
    size = f"size={SMALL_DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "lockstep-chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
