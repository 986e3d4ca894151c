"""How an attempt ended: its exit code and reason, in one line, for people, job scripts and `outcome.json`."""

from __future__ import annotations

import bdb
import os
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data.errors import CorruptData, NoRoom, Unavailable
from distrib.finite_watch import NonFinite
from distrib.phases import now
from launch.exit_codes import DO_NOT_RESTART, DONE, FAILED, STOPPED_EARLY, USAGE, RunEnded
from launch.post_mortem import describe_exception, read_post_mortem, write_post_mortem
from launch.run_directory import OUTCOME_FILE, RunDirectory, read_outcome

# What gloo and NCCL say when another worker is gone; the cause is in that worker's own words.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
)
_WAITED = ("timed out", "timeout")
# What torch says when the host, rather than an accelerator, has no memory left: it has no type of its own.
_HOST_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class Ending:
    """An exit code of `launch.exit_codes`, and why."""

    exit_code: int
    reason: str
    peer_lost: bool = False
    """Another worker ended first: what it says comes before what this one says."""
    waited: bool = False
    """Whether contact was lost because another did not come within the process group's time, and not because it is gone."""
    told_by_all: bool = False
    """Every rank ends with this same reason: one of them tells it."""
    expected: bool = True
    """Whether the reason says it all; if not, the traceback is needed."""


def ending_of_failure(error: BaseException) -> Ending:
    """What an exception that ends an attempt means."""
    if isinstance(error, RunEnded):
        return Ending(error.exit_code, str(error), told_by_all=error.told_by_all)
    if isinstance(error, CorruptData | NoRoom | NonFinite):
        return Ending(DO_NOT_RESTART, str(error))
    if isinstance(error, Unavailable):
        return Ending(FAILED, str(error))
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _HOST_OUT_OF_MEMORY in text:
        first_line = text[max(0, text.find(_HOST_OUT_OF_MEMORY)) :].split("\n")[0] or "no memory left"
        return Ending(DO_NOT_RESTART, f"out of memory: {first_line}; lower batch.micro_samples or the model's size")
    if isinstance(error, bdb.BdbQuit):
        return Ending(FAILED, "ended from the debugger")
    if isinstance(error, KeyboardInterrupt):
        return Ending(FAILED, "interrupted at once; what was saved last is intact")
    lost = isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
    if lost or (isinstance(error, RuntimeError) and any(lost_text in text for lost_text in _PEER_LOST)):
        waited = any(word in text.lower() for word in _WAITED)
        return Ending(FAILED, "lost contact with another worker; its own log says why", peer_lost=True, waited=waited)
    return Ending(FAILED, f"{type(error).__name__}: {error}".split("\n")[0], expected=False)


def ending_of_run(
    step: int, steps: int, saved_step: int | None, save_failure: str | None, stop_reason: str | None
) -> Ending:
    """How a loop that came to its end, or was stopped, ends the attempt. stop_reason: why it stopped itself, if it did."""
    if save_failure is not None:
        return Ending(DO_NOT_RESTART, f"after step {step}: {save_failure}")
    if step < steps:
        assert saved_step == step
        if stop_reason is not None:
            return Ending(STOPPED_EARLY, f"stopped after step {step} of {steps}: {stop_reason}; everything is saved")
        return Ending(STOPPED_EARLY, f"stopped on request after step {step} of {steps}; everything is saved")
    return Ending(DONE, f"all {steps} steps are done")


def leave_post_mortem(run: RunDirectory, ending: Ending, error: BaseException, *, rank: int, supervised: bool) -> None:
    """Puts on record of what this worker fails, where it is for it to say: as with `write_outcome`."""
    if isinstance(error, KeyboardInterrupt) or ending.exit_code == USAGE or not _has_the_word(ending, rank, supervised):
        return
    moment = now()
    if ending.peer_lost:
        time.sleep(_GRACE_SECONDS)
        known = read_post_mortem(run.path)
        if known is not None and known["attempt"] == run.attempt:
            return
    write_post_mortem(
        run.path,
        attempt=run.attempt,
        rank=rank,
        phase=moment.phase,
        step=moment.step,
        cause=_cause_of(error, ending),
        reason=ending.reason,
        exit_code=ending.exit_code,
        pid=os.getpid(),
        exception=describe_exception(error),
    )


def _cause_of(error: BaseException, ending: Ending) -> str:
    """What depends on others may last; what a run has found about itself may not come again and again."""
    if isinstance(error, Unavailable) or ending.peer_lost:
        return "unavailable"
    return "ended" if ending.expected else "exception"


def _has_the_word(ending: Ending, rank: int, supervised: bool) -> bool:
    """Whether it is for this rank to say how the attempt ended. A supervisor knows better than a rank that only lost contact
    who failed, and need not wait for others to say it."""
    if ending.peer_lost and supervised:
        return False
    return rank == 0 or not (ending.exit_code in (DONE, STOPPED_EARLY) or ending.peer_lost or ending.told_by_all)


def write_outcome(
    run: RunDirectory, ending: Ending, *, rank: int, step: int, seconds: float, supervised: bool = False
) -> None:
    """Writes outcome.json. Rank 0 writes for all that ended well; a worker that failed writes for itself, and one that
    only lost contact leaves the word to the one that failed."""
    if not _has_the_word(ending, rank, supervised):
        return
    if ending.peer_lost:
        time.sleep(_GRACE_SECONDS)
        if _already_told(run):
            return
    outcome = {
        "exit_code": ending.exit_code,
        "reason": ending.reason,
        "step": step,
        "attempt": run.attempt,
        "pid": os.getpid(),
        "seconds": round(seconds, 3),
    }
    try:
        run.write_json(OUTCOME_FILE, outcome)
    except OSError as error:
        # A full disk must not hide why the attempt ended: the reason and the exit code still reach who started it.
        print(
            f"lockstep: warning: {run.path / OUTCOME_FILE}: cannot be written ({error.strerror})",
            file=sys.stderr,
            flush=True,
        )


def _already_told(run: RunDirectory) -> bool:
    outcome = read_outcome(run.path)
    return outcome is not None and outcome["attempt"] == run.attempt
