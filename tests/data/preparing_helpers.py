"""Preparations in small units, killed at chosen moments: whole processes of their own, as they are killed in real life."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

# `actions` are carried out one after the other, each a call of prepare or merge. With `inside`, the tasks too are carried out in
# the process itself, which then is killed at the call number `kill_at` of those that alter a directory, or sync it.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import data.prepare, data.units
from data.config import DataConfig
from data.prepare import Part, merge, prepare

data.units.UNIT_BYTES = 4000
CALLS = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync")

def carry_out(action):
    config = DataConfig.model_validate_json(json.dumps(action["config"]))
    tell = lambda line: print(line, flush=True)
    if action["do"] == "merge":
        merge(config.directory, workers=action["workers"], tell=tell)
    else:
        part = Part.parse(action["part"]) if action["part"] else None
        prepare(config, workers=action["workers"], part=part, tell=tell)

def kill_at(number):
    calls = 0
    def counted(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        return call
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))

def in_child(action, number):
    # Whether it ended by itself. A child costs milliseconds, where a process would cost a second.
    child = os.fork()
    if child == 0:
        try:
            if number:
                kill_at(number)
            carry_out(action)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("a child failed")
    return not os.WIFSIGNALED(status)

def inside():
    from PIL import Image
    Image.init()  # once, and not in each child
    real = data.prepare.work_through
    data.prepare.work_through = lambda schedule, job, processes: real(schedule, job, 0)
"""


def run_program(program: str, *values: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that begins with PROGRAM; `values` are its arguments, as JSON."""
    command = [sys.executable, "-c", PROGRAM + program, *(json.dumps(value, default=str) for value in values)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **environment}
    )


def action(
    config: dict[str, object], *, part: str | None = None, workers: int = 1, do: str = "prepare"
) -> dict[str, object]:
    """A call of prepare, or of merge."""
    return {"do": do, "config": config, "part": part, "workers": workers}


def prepare_apart(config: dict[str, object], **options: object) -> str:
    """Prepare in a process of its own, in small units; what it told."""
    done = run_program("carry_out(json.loads(sys.argv[1]))", action(config, **options))  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return done.stdout


def hash_of(directory: Path) -> str:
    """One hash of all names and contents in a directory."""
    whole = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        content = path.read_bytes() if path.is_file() else b"directory"
        whole.update(f"{path.relative_to(directory)} {len(content)}\n".encode() + content)
    return whole.hexdigest()


def serves(pid: int) -> bool:
    """Whether this process is alive, and one that `data.child` has started."""
    try:
        return b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()  # nothing of one that nobody has waited for
    except (FileNotFoundError, ProcessLookupError):
        return False
