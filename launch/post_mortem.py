"""`post-mortem.json`: of what an attempt died. The last death, with those before it under `earlier`. Imports no torch.

A worker that fails writes it; of one that could not (it was killed, or hung) `lockstep train` does.
"""

from __future__ import annotations

import json
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from distrib.manifest import write_durably
from launch.tracking.metrics_file import read_last_step

POST_MORTEM_FILE = "post-mortem.json"
_FRAMES = 12
_MESSAGE_CHARACTERS = 2000
_EARLIER = 50


def write_post_mortem(
    run: Path,
    *,
    attempt: int | None,
    rank: int,
    phase: str,
    step: int,
    cause: str,
    reason: str,
    exit_code: int | None,
    pid: int,
    exception: dict[str, Any] | None = None,
    signal: str | None = None,
    **more: Any,
) -> None:
    """Puts a death on record. A disk that takes no file is told about: it must not hide why the attempt ended."""
    path = run / POST_MORTEM_FILE
    before = read_post_mortem(run)
    earlier = [] if before is None else [*before.pop("earlier"), before][-_EARLIER:]
    record = {
        "attempt": attempt,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rank": rank,
        "host": socket.gethostname(),
        "pid": pid,
        "phase": phase,
        "step": step,
        "cause": cause,
        "reason": reason,
        "exit_code": exit_code,
        "signal": signal,
        "exception": exception,
        **more,
        "last_metrics": read_last_step(run),
        "earlier": earlier,
    }
    try:
        write_durably(path, json.dumps(record, indent=2).encode() + b"\n")
    except OSError as error:
        print(f"lockstep: warning: {path}: cannot be written ({error.strerror})", file=sys.stderr, flush=True)


def read_post_mortem(run: Path) -> dict[str, Any] | None:
    """The last death and those before it; None where the run has had none. A damaged file is put aside, which is told: what
    it said of earlier deaths must not hide this one."""
    path = run / POST_MORTEM_FILE
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and isinstance(record.get("earlier"), list) and record.keys() >= {"attempt", "pid"}:
        return record
    _put_aside(path)
    return None


def _put_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}.corrupt")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return  # another worker was quicker
    except OSError as error:
        told = f"cannot be put aside ({error.strerror})"
    else:
        told = f"kept as {aside.name}"
    print(f"lockstep: warning: {path}: not what a run writes; {told}", file=sys.stderr, flush=True)


def describe_exception(error: BaseException) -> dict[str, Any]:
    """Type, message, and the last calls: where they are, not with what values."""
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    return {
        "type": type(error).__name__,
        "message": str(error)[:_MESSAGE_CHARACTERS],
        "frames": [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames],
    }
