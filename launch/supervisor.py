"""`lockstep train`: starts a worker per GPU or several on the CPU, starts them again where they die or hang, and ends as
they end. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import CorruptData
from distrib.manifest import published_checkpoints, write_durably
from launch.clock import process_began
from launch.config import RunConfig
from launch.exit_codes import DO_NOT_RESTART, DONE, FAILED, STOPPED_EARLY, USAGE
from launch.hangs import Limits
from launch.post_mortem import read_post_mortem, write_post_mortem
from launch.restarts import Again, Death, GiveUp, Restarts
from launch.run_directory import (
    OUTCOME_FILE,
    STOP_FILE,
    Resume,
    put_end_on_record,
    read_identity,
    read_outcome,
)
from launch.stop_signals import StopSignals
from launch.worker_group import AttemptEnd, Worker, WorkerGroup

_DEFAULT_CPU_WORKERS = 2
_STOP_FILE_SECONDS = 0.5

_Record = dict[str, Any]
_Records = tuple[_Record | None, _Record | None]
"""What post-mortem.json and outcome.json say."""


def count_gpus() -> int:
    """GPUs that torch sees. Asked of another process, and only where a driver is installed: torch takes seconds to import."""
    if shutil.which("nvidia-smi") is None:
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def default_workers(device: str) -> int:
    """One worker per GPU; without a GPU two, or one where there is but one core."""
    gpus = 0 if device == "cpu" else count_gpus()
    return gpus or min(_DEFAULT_CPU_WORKERS, os.cpu_count() or 1)


def supervise(arguments: Sequence[str], workers: int, config: RunConfig, resume: Resume) -> int:
    """Runs `workers` workers with these arguments to the run's end and returns its exit code."""
    with StopSignals() as signals:
        return _Supervision(arguments, workers, config, resume, signals).run()


class _Supervision:
    """The attempts of one `lockstep train`."""

    def __init__(
        self, arguments: Sequence[str], workers: int, config: RunConfig, resume: Resume, signals: StopSignals
    ) -> None:
        self._arguments, self._workers, self._config, self._resume = list(arguments), workers, config, resume
        self._signals = signals
        self._limits = Limits.of_run(config)
        self._begun = time.monotonic()
        self._attempts_known = 0
        self._directory = resume.directory
        self._found = self._checkpoints()
        newest = max(self._found, default=None) if resume.from_newest else None
        self._restarts = Restarts(config.run.max_restarts, config.run.restart_backoff_seconds, newest)

    def run(self) -> int:
        self._attempts()  # a damaged run.json is refused before anybody is started
        try:
            return self._run()
        except CorruptData as error:
            self._write_outcome(DO_NOT_RESTART, str(error), self._newest_checkpoint() or 0)
            raise

    def _run(self) -> int:
        number, launched = 0, process_began()
        while True:
            attempts_before = self._attempts()
            known = self._records()
            group = WorkerGroup(self._command(), self._workers, self._limits, number, launched)
            try:
                end = group.wait(self._signals)
            finally:
                group.kill()
                group.close()
            self._directory = end.run_directory or self._directory
            attempt = self._attempts() if self._attempts() > attempts_before else None
            if self._directory is not None and attempt is not None:
                put_end_on_record(self._directory, attempt, time.time())
            code = _run_exit_code(end.codes)
            if code in (DONE, STOPPED_EARLY):
                return code
            if self._signals.interrupts > 1:
                return self._interrupted(end)
            if code == USAGE:
                return USAGE
            post_mortem, outcome = _new_records(self._records(), known, end)
            death = self._establish(end, attempt, post_mortem, number)
            if code == DO_NOT_RESTART:
                return DO_NOT_RESTART
            if self._signals.asked:
                self._tell_unless_told(death, outcome)
                return FAILED
            verdict = self._restarts.after(death, self._newest_checkpoint())
            if isinstance(verdict, GiveUp):
                return self._give_up(death, verdict, outcome)
            if self._stopped_before(death, verdict):
                return STOPPED_EARLY
            number, launched = number + 1, time.monotonic_ns()

    def _command(self) -> list[str]:
        """The workers' arguments: as given at first, then to go on from the newest checkpoint of this supervision."""
        if self._directory is None:
            return self._arguments
        words = list(self._arguments)
        if self._resume.directory is None:
            words.append(f"run.directory={self._directory}")
        new = {step: path for step, path in self._checkpoints().items() if self._found.get(step) != path}
        if self._resume.checkpoint is None:
            return words if self._resume.from_newest else [*words, "--resume", "auto"]
        if not new:
            return words
        at = words.index("--resume")
        return [*words[:at], "--resume", new[max(new)][0], *words[at + 2 :]]

    def _checkpoints(self) -> dict[int, tuple[str, int]]:
        """Step -> (path, which directory it is: a step that is saved anew gets another) of what is published."""
        if self._directory is None:
            return {}
        published = published_checkpoints(self._directory / "checkpoints")
        return {int(path.name.removeprefix("step-")): (str(path), path.stat().st_ino) for path in published}

    def _newest_checkpoint(self) -> int | None:
        """The last step saved by this supervision, or that it began from; None where there is none."""
        found = self._checkpoints()
        if not self._resume.from_newest and self._resume.checkpoint is not None:
            found = {step: path for step, path in found.items() if self._found.get(step) != path}
        return max(found, default=None)

    def _attempts(self) -> int:
        """How many attempts the run's identity lists."""
        if self._directory is None or not (self._directory / "run.json").exists():
            return 0
        self._attempts_known = len(read_identity(self._directory)["attempts"])
        return self._attempts_known

    def _records(self) -> _Records:
        if self._directory is None:
            return None, None
        return read_post_mortem(self._directory), read_outcome(self._directory)

    def _establish(self, end: AttemptEnd, attempt: int | None, written: _Record | None, restarts: int) -> Death:
        """Of what an attempt died; put on record where no worker did so."""
        death, worker = _find_death(end, written)
        if self._directory is None or death.cause in ("exception", "ended", "unavailable"):
            return death
        for rank, text in end.stacks.items():
            _write(self._directory / "logs" / f"stacks-rank-{rank}.txt", text.encode())
        write_post_mortem(
            self._directory,
            attempt=attempt,
            rank=death.rank,
            phase=death.phase,
            step=death.step,
            cause=death.cause,
            reason=death.reason,
            exit_code=None if worker.process.returncode < 0 else worker.process.returncode,
            pid=worker.process.pid,
            signal=death.name if death.cause == "signal" else None,
            restarts=restarts,
            ranks=[{"rank": rank, "phase": beat.phase, "step": beat.step} for rank, beat in enumerate(end.beats)],
            stacks=[f"logs/stacks-rank-{rank}.txt" for rank in sorted(end.stacks)],
        )
        return death

    def _interrupted(self, end: AttemptEnd) -> int:
        reason = "interrupted twice: ended at once; what was saved last is intact"
        _say(reason)
        self._write_outcome(FAILED, reason, max(beat.step for beat in end.beats))
        return FAILED

    def _tell_unless_told(self, death: Death, outcome: _Record | None) -> None:
        """What ended the run, where no worker could say it: those that were left knew only that another was gone."""
        if death.cause in ("signal", "hang") or (death.cause == "exit" and death.name != str(FAILED)):
            _say(death.reason)
            self._write_outcome(FAILED, death.reason, death.step)
        elif outcome is None or outcome["exit_code"] in (DONE, STOPPED_EARLY):
            self._write_outcome(FAILED, death.reason, death.step)

    def _give_up(self, death: Death, verdict: GiveUp, outcome: _Record | None) -> int:
        if verdict.repeated is not None:
            reason = (
                f"died {verdict.repeated} times in the same way at step {death.step} and would again: {death.reason}"
            )
            _say(f"error: {reason}")
            self._write_outcome(DO_NOT_RESTART, reason, death.step)
            return DO_NOT_RESTART
        self._tell_unless_told(death, outcome)
        if self._restarts.allowed:
            _say(f"error: restarted {self._restarts.allowed} times without a later checkpoint; giving up")
        return FAILED

    def _stopped_before(self, death: Death, again: Again) -> bool:
        """Waits until the next attempt is due. True where a request to stop came meanwhile."""
        when = f" in {again.after_seconds:g} s" if again.after_seconds else ""
        _say(f"{death.reason}; starting again{when} ({again.number} of {self._restarts.allowed})")
        due = time.monotonic() + again.after_seconds
        while not self._stop_asked():
            left = due - time.monotonic()
            if left <= 0:
                return False
            self._signals.wait(min(left, _STOP_FILE_SECONDS))
        reason = "stopped on request before another attempt; what was saved last is intact"
        self._write_outcome(STOPPED_EARLY, reason, self._newest_checkpoint() or 0)
        _say(reason)
        return True

    def _stop_asked(self) -> bool:
        self._signals.take()
        return self._signals.asked or (self._directory is not None and (self._directory / STOP_FILE).exists())

    def _write_outcome(self, exit_code: int, reason: str, step: int) -> None:
        if self._directory is None:
            return
        outcome = {
            "exit_code": exit_code,
            "reason": reason,
            "step": step,
            "attempt": self._attempts_known,
            "pid": os.getpid(),
            "seconds": round(time.monotonic() - self._begun, 3),
        }
        _write(self._directory / OUTCOME_FILE, json.dumps(outcome, indent=2).encode() + b"\n")


def _new_records(records: _Records, known: _Records, end: AttemptEnd) -> _Records:
    """What the workers of an attempt have put on record themselves, by what it says: clocks jump. `known`: what was there
    before them."""
    pids = {worker.process.pid for worker in end.workers}
    post_mortem, outcome = (
        record if record is not None and record != before and record["pid"] in pids else None
        for record, before in zip(records, known, strict=True)
    )
    return post_mortem, outcome


def _find_death(end: AttemptEnd, written: _Record | None) -> tuple[Death, Worker]:
    """Which rank is the cause, and of what it died. A kill comes from outside; a rank that aborts may only have met the end
    of another, which then has told an exception."""
    told = next((worker for worker in end.workers if written and written["pid"] == worker.process.pid), None)
    if end.hung is not None and told is None:
        rank, why = end.hung
        beat = end.beats[rank]
        reason = f"rank {rank} hung in {beat.phase} at step {beat.step} for {end.hung_seconds:.0f} s: {why}"
        return Death(rank, beat.phase, beat.step, "hang", beat.phase, reason), end.workers[rank]
    by_signal = [worker for worker in end.failed if worker.process.returncode < 0]
    aborted = [worker for worker in by_signal if worker.process.returncode == -signal.SIGABRT]
    killed = [worker for worker in by_signal if worker not in aborted]
    left = [worker for worker in end.failed if worker.left_early]
    if told is not None and written is not None and not killed and not left:
        rank = written["rank"]
        name = written["exception"]["type"]
        death = Death(
            rank, written["phase"], written["step"], written["cause"], name, f"rank {rank} failed: {written['reason']}"
        )
        return death, told
    # Two may have ended between two looks, and nobody knows which was first: who only lost another is not the cause.
    own = [worker for worker in end.failed if worker.last_word not in ("lost contact", "waited in vain")]
    worker = [*killed, *left, *aborted, *own, *end.failed][0]
    rank, code, beat = worker.rank, worker.process.returncode, end.beats[worker.rank]
    place = f"in {beat.phase} at step {beat.step}"
    if code < 0:
        name = _signal_name(-code)
        return Death(rank, beat.phase, beat.step, "signal", name, f"rank {rank} was killed by {name} {place}"), worker
    reason = f"rank {rank} ended with exit code {code} {place}" + (", before the run's end" if left else "")
    return Death(rank, beat.phase, beat.step, "exit", str(code), reason), worker


def _signal_name(number: int) -> str:
    """Signals between SIGRTMIN and SIGRTMAX have no names of their own."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _run_exit_code(codes: Sequence[int]) -> int:
    """The run's code from its workers': the most telling one. A worker killed by a signal is a plain failure."""
    for telling in (USAGE, DO_NOT_RESTART):
        if telling in codes:
            return telling
    if all(code in (DONE, STOPPED_EARLY) for code in codes):
        return max(codes)
    return FAILED


def _say(text: str) -> None:
    print(f"lockstep: {text}", file=sys.stderr, flush=True)


def _write(path: Path, content: bytes) -> None:
    """A file that tells how an attempt ended. A full disk must not change how it ends."""
    try:
        write_durably(path, content)
    except OSError as error:
        _say(f"warning: {path}: cannot be written ({error.strerror})")
