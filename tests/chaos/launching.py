"""Starts `lockstep` commands that may be killed, stopped or left behind, and knows every process that comes of them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tests.end_to_end.runs import LOCKSTEP, environment, is_running, wait_until

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).with_name("site")
# Only ever reached where something hangs.
TIMEOUT_SECONDS = 150.0
_LOOK_SECONDS = 0.3
_LOOKS = 20
_MARK = "CHAOS_MARK"


class Started(Protocol):
    """A command on its way."""

    def poll(self) -> int | None: ...


class Launcher:
    """Starts commands one at a time, as a person would: each is a new interpreter."""

    def __init__(self) -> None:
        self._mark = f"{_MARK}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        self.environment = environment(**{name: value, "PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)])})

    def start(self, *arguments: object, cwd: Path, env: Mapping[str, str], out: Path, err: Path) -> Started:
        """`lockstep ARGUMENTS`, in a session of its own."""
        with out.open("w") as out_file, err.open("w") as err_file:
            return subprocess.Popen(
                [LOCKSTEP, *map(str, arguments)],
                cwd=cwd,
                env={**self.environment, **env},
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """All that any command of this launcher has started and that is still there, whoever its parent is by now."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes() and is_running(int(folder.name)):
                    found.append(int(folder.name))
        return sorted(found)

    def shared_memory(self) -> set[Path]:
        """The files of /dev/shm that its processes have open or mapped now."""
        found = set()
        for pid in self.processes():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
                found |= {Path(line.split(maxsplit=5)[5]) for line in lines if "/dev/shm/" in line}
                opened = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
                found |= {Path(name) for name in opened if name.startswith("/dev/shm/")}
        return found

    def kill_what_is_left(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.processes(), "the end of what was killed")

    def close(self) -> None:
        self.kill_what_is_left()


class WarmLauncher(Launcher):
    """Starts them by forking a process that has imported what they import, see warm_launcher.py: seconds less a command."""

    def __init__(self) -> None:
        super().__init__()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.warm_launcher"],
            # Arrow's own allocator would start a thread.
            env={**self.environment, "ARROW_DEFAULT_MEMORY_POOL": "system"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._said = b""
        self._last: _OfServer | None = None
        assert self.read_line() == "ready"

    def start(self, *arguments: object, cwd: Path, env: Mapping[str, str], out: Path, err: Path) -> Started:
        assert self._server.stdin is not None
        request = {
            "module": "launch.cli",
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd),
            "environment": {**self.environment, **env},
            "limits": [],
            "out": str(out),
            "err": str(err),
        }
        for path in (out, err):
            path.write_bytes(b"")
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        self.read_line()  # the process id
        self._last = _OfServer(self)
        return self._last

    def kill_what_is_left(self) -> None:
        super().kill_what_is_left()
        if self._last is not None:
            wait_until(lambda: self._last is None or self._last.poll() is not None, "the end of a killed command")

    def processes(self) -> list[int]:
        return [pid for pid in super().processes() if pid != self._server.pid]

    def close(self) -> None:
        super().close()
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def answered(self) -> bool:
        """Whether there is a line to read."""
        assert self._server.stdout is not None
        while b"\n" not in self._said and select.select([self._server.stdout], [], [], 0)[0]:
            self._said += self._read_some()
        return b"\n" in self._said

    def read_line(self) -> str:
        while b"\n" not in self._said:
            self._said += self._read_some()
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def _read_some(self) -> bytes:
        assert self._server.stdout is not None
        some = os.read(self._server.stdout.fileno(), 4096)
        assert some, "the warm process has ended"
        return some


class _OfServer:
    def __init__(self, launcher: WarmLauncher) -> None:
        self._launcher = launcher
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and self._launcher.answered():
            self._code = int(self._launcher.read_line())
        return self._code


def state_of(pid: int) -> str:
    """One letter, as in /proc/PID/stat; empty where the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def processor_ticks(pid: int) -> int:
    """How long a process has run so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return int(fields[11]) + int(fields[12])


def wait_for_end(process: Started, launcher: Launcher, shared_memory: set[Path], *, wake_stopped: bool) -> int:
    """Waits for a command, and adds to `shared_memory` what its processes use of it. `wake_stopped`: a process that was
    stopped goes on once all the others wait for it."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    seen_idle: tuple[list[int], int] = ([], 0)
    look = 0.0
    while (code := process.poll()) is None:
        now = time.monotonic()
        assert now < deadline, "a command came to no end"
        time.sleep(0.01)
        if now > look:
            look = now + _LOOK_SECONDS
            shared_memory |= launcher.shared_memory()
        if wake_stopped:
            seen_idle = _wake(launcher, *seen_idle)
    return code


def _wake(launcher: Launcher, ticks: list[int], times: int) -> tuple[list[int], int]:
    """Counts the looks since which nobody was seen to have run, and wakes what is stopped when they are enough."""
    pids = launcher.processes()
    now = [processor_ticks(pid) for pid in pids]
    stopped = [pid for pid in pids if state_of(pid) == "T"]
    if not stopped or now != ticks:
        return now, 0
    if times == _LOOKS:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    return now, times + 1
