"""Runs in every worker of a case and makes its faults happen at their moments. The folder named by CHAOS tells which, and
hears of each that has happened.

A fault of the plan happens once, and only after the one before it in the plan: by files, because those who do it are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BALLOON = "balloon"
_real_clock = time.time


def inject_into_this_worker() -> None:
    from distrib.phases import observe

    observe(Injector(Path(os.environ["CHAOS"]), int(os.environ["RANK"])).hear)


class Injector:
    """Hears of every phase of this worker."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._faults: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())
        self._first_step: int | None = None
        self._begun = _real_clock()

    def hear(self, moment: Any) -> None:
        if moment.phase == "data":
            self._note_first_step(moment.step)
        for number, fault in enumerate(self._faults):
            if fault["phase"] == moment.phase and fault["step"] in (moment.step, None) and self._may(number):
                self._happen(number, fault, moment)

    def _note_first_step(self, steps_done: int) -> None:
        """When this process has done a step: from then on a fault before it is overcome."""
        if self._first_step is None:
            self._first_step = steps_done
        elif self._rank == 0 and steps_done == self._first_step + 1:
            _write(self._folder / f"worked-{os.getpid()}", {"begun": self._begun, "time": _real_clock()})

    def _may(self, number: int) -> bool:
        rank = self._faults[number]["rank"]
        before = number == 0 or any(self._folder.glob(f"happened-{number - 1}-*"))
        return before and rank in (self._rank, None) and not self._record(number).exists()

    def _record(self, number: int) -> Path:
        return self._folder / f"happened-{number}-{self._rank}"

    def _happen(self, number: int, fault: dict[str, Any], moment: Any) -> None:
        _write(self._record(number), {"time": _real_clock(), "phase": moment.phase, "step": moment.step})

        def act() -> None:
            for name, arguments in fault["actions"]:
                ACTIONS[name](**arguments)

        if fault["delay_seconds"]:
            threading.Timer(fault["delay_seconds"], act).start()
        else:
            act()


def _write(path: Path, record: dict[str, Any]) -> None:
    """Whole, or not at all: another rank's fault may kill this one meanwhile."""
    half_written = path.with_name(f".{path.name}")
    half_written.write_text(json.dumps(record))
    half_written.replace(path)


def await_saves(folder: str, names: list[str]) -> None:
    """Until these are the checkpoints, and nothing else is there: a save, and what it deletes, goes on beside the steps."""
    while sorted(path.name for path in Path(folder).glob("step-*")) != names or any(Path(folder).glob(".tmp-*")):
        time.sleep(0.001)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def kill_launcher() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def kill_all() -> None:
    """The launcher, every worker, and whatever else they have started, this process last."""
    launcher = os.getppid()
    for pid in [launcher, *_descendants(launcher)]:
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _descendants(pid: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                child = int(stat.parent.name)
                yield child
                yield from _descendants(child)


def fill_disk(folder: str) -> None:
    """Leaves no room on the disk that `folder` lies on."""
    # What else writes meanwhile may take the last of it: then it is full all the same.
    with (Path(folder) / BALLOON).open("ab", buffering=0) as balloon, contextlib.suppress(OSError):
        while free := _free(folder):
            balloon.write(bytes(free))


def _free(folder: str) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def make_room(folder: str) -> None:
    (Path(folder) / BALLOON).unlink(missing_ok=True)


def limit_files(largest_bytes: int | None) -> None:
    """This process may write no file beyond so many bytes; None: any. As `ulimit -f`."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if largest_bytes is None else largest_bytes, hard))


def flip_bit(pattern: str, seed: int, of: str) -> None:
    """Changes one bit: of one file that `pattern` matches, of one in the folder with the highest name, or of each file."""
    choose = random.Random(seed)
    found = sorted(path for path in Path("/").glob(pattern.lstrip("/")) if path.is_file() and path.stat().st_size)
    if of == "one of the newest":
        found = [path for path in found if path.parent == found[-1].parent]
    for path in found if of == "each" else [choose.choice(found)]:
        _flip_bit_of(path, choose)


def _flip_bit_of(path: Path, choose: random.Random) -> None:
    at = choose.randrange(path.stat().st_size)
    path.chmod(0o644)  # files of a cache are read-only, which is no hindrance to a disk
    with path.open("r+b") as file:
        file.seek(at)
        altered = file.read(1)[0] ^ (1 << choose.randrange(8))
        file.seek(at)
        file.write(bytes([altered]))


def delete(pattern: str) -> None:
    for path in Path("/").glob(pattern.lstrip("/")):
        path.unlink()


def make_read_only(folder: str) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def turn_back_clock(folder: str | None) -> None:
    """By ten days for this process; what lies in `folder` gets dates that are the later, the lower its names are."""
    now = time.time
    time.time = lambda: now() - 864_000
    for days, path in enumerate(sorted(Path(folder).iterdir(), reverse=True) if folder else []):
        for file in (*path.glob("*"), path):
            os.utime(file, (days * 86_400, days * 86_400))


def leave_behind(file: str) -> None:
    """A process and a file that nobody will remove."""
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    Path(file).touch()


def poison() -> None:
    """Makes something not a number in what the engine is about to use: a weightless change of what flows through it."""
    import torch

    frame = _engine_frame()
    engine = frame.f_locals["self"]
    nan = float("nan")
    if frame.f_code.co_name == "_forward":  # the result of this forward pass

        def once(module: Any, inputs: Any, output: Any) -> Any:
            handle.remove()
            return output * nan

        handle = engine._module.register_forward_hook(once)
    elif "total" in frame.f_locals:  # the gradient that the backward pass begins with
        frame.f_locals["total"].register_hook(lambda gradient: gradient * nan)
    else:  # all gradients, after they were summed over the ranks
        with torch.no_grad():
            for parameter in engine._module.parameters():
                parameter.grad.fill_(nan)


def _engine_frame() -> Any:
    """Where the engine said that it begins a phase."""
    frame: Any = sys._getframe()
    while not hasattr(frame.f_locals.get("self"), "_module"):
        frame = frame.f_back
    return frame


ACTIONS: dict[str, Callable[..., None]] = {
    action.__name__: action
    for action in (
        await_saves,
        send,
        kill_launcher,
        kill_all,
        fill_disk,
        make_room,
        make_read_only,
        limit_files,
        flip_bit,
        delete,
        turn_back_clock,
        leave_behind,
        poison,
    )
}
