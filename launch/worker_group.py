"""The worker processes of one attempt on this host: started, watched, asked to stop, ended. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distrib.launchers import LISTENING, STARTED_BY_LOCKSTEP
from launch.clock import LAUNCHED
from launch.exit_codes import DONE, FAILED, STOPPED_EARLY
from launch.hangs import Hang, HangWatch, Limits, find_cause, find_missed
from launch.heartbeats import Beat, Board, LastWord
from launch.stop_signals import StopSignals
from launch.stopping import STOP_SIGNALS
from launch.supervised import STACKS_SIGNAL, SUPERVISOR

LOOK_SECONDS = 0.25
# How long the other workers may take to say their last words once one has ended badly.
_GRACE_SECONDS = 5.0
# One that was killed says nothing, and all that the others can say is that it is gone: nothing is worth waiting for.
_GRACE_AFTER_KILL_SECONDS = 0.2
# Looked for so often; and what did not grow for so many looks is all that a rank has to say. Looks are counted, not seconds:
# a pause of the machine is not held against who was to answer.
_STACKS_LOOKS = 100
_STACKS_STILL_LOOKS = 8
_STACKS_LOOK_SECONDS = 0.05


@dataclass
class Worker:
    """One worker, and what is known of its end."""

    rank: int
    process: subprocess.Popen[bytes]
    stacks: int
    """File descriptor of the memory that it writes its stacks to."""
    killed_by_us: bool = False
    last_word: LastWord = "nothing"
    """What it said of its own end, once it has ended."""

    @property
    def code(self) -> int | None:
        """Its exit code, or minus the signal; None while it runs."""
        return self.process.poll()

    @property
    def left_early(self) -> bool:
        """Whether it ended with the exit code of one that is done, and had not come to its end."""
        return self.code in (DONE, STOPPED_EARLY) and self.last_word != "came to its end"


@dataclass
class AttemptEnd:
    """How the workers ended."""

    workers: list[Worker]
    """All of them, by rank."""
    failed: list[Worker]
    """Those that ended badly and not by our hand, in the order in which they did."""
    beats: list[Beat]
    """Where each rank was."""
    run_directory: Path | None
    """None where the attempt came to its end before it had one."""
    hung: tuple[int, str] | None = None
    """The rank that hung, and what is known of that."""
    hung_seconds: float = 0.0
    stacks: dict[int, str] = field(default_factory=dict)
    """Of every rank that answered, where one hung."""

    @property
    def codes(self) -> list[int]:
        """A worker that left early has failed."""
        return [FAILED if worker.left_early else worker.process.returncode for worker in self.workers]


@dataclass(frozen=True)
class _Examined:
    """A hang, looked into before anybody was ended."""

    cause: tuple[int, str]
    seconds: float
    beats: list[Beat]
    stacks: dict[int, str]


class WorkerGroup:
    """The workers of one attempt."""

    def __init__(
        self, arguments: Sequence[str], workers: int, limits: Limits | None, restarts: int, launched: int
    ) -> None:
        """launched: when the work on this attempt began, in nanoseconds of the monotonic clock."""
        self._board = Board(workers)
        self._watch = HangWatch(self._board, limits)
        # Workers inherit the block and lift it once they listen: a request to stop is heard, however early it comes.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [*STOP_SIGNALS, STACKS_SIGNAL])
        try:
            # Closed here once rank 0 has it: where that dies, whoever comes to meet it is told at once.
            with socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN) as meeting:
                self.workers = [
                    self._start(arguments, rank, workers, meeting, restarts, launched) for rank in range(workers)
                ]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._failed: list[Worker] = []

    def wait(self, signals: StopSignals) -> AttemptEnd:
        """Until all workers have ended; asks them to stop when `signals` say so."""
        hang: _Examined | None = None
        kill_at: float | None = None
        looked = time.monotonic()
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as open_files:
            selector.register(signals, selectors.EVENT_READ)
            for worker in self.workers:
                ended = os.pidfd_open(worker.process.pid)
                open_files.callback(os.close, ended)
                selector.register(ended, selectors.EVENT_READ, worker)
            while any(worker.code is None for worker in self.workers):
                for key, _ in selector.select(LOOK_SECONDS):
                    if key.data is not None and key.data.code is not None:
                        selector.unregister(key.fd)
                        self._note_end(key.data)
                self._pass_on(signals)
                now = time.monotonic()
                if self._failed and kill_at is None:
                    killed = self._failed[0].code == -signal.SIGKILL
                    kill_at = now + (_GRACE_AFTER_KILL_SECONDS if killed else _GRACE_SECONDS)
                silent: Hang | None = None
                if now - looked >= LOOK_SECONDS:
                    silent = self._watch.look(now - looked, [worker.rank for worker in self._running()])
                    looked = now
                if kill_at is not None and now > kill_at:
                    hang = hang or self._examine_who_was_missed()
                    self.kill()
                elif kill_at is None and silent is not None:
                    hang = self._examine(silent)
                    kill_at = now
                    self.kill()
        for worker in self.workers:
            self._note_end(worker)
        return self._end(hang)

    def kill(self) -> None:
        for worker in self._running():
            worker.killed_by_us = True
            worker.process.kill()

    def close(self) -> None:
        """Gives up what was shared with the workers, which have ended."""
        self._board.close()
        for worker in self.workers:
            os.close(worker.stacks)

    def _start(
        self, arguments: Sequence[str], rank: int, workers: int, meeting: socket.socket, restarts: int, launched: int
    ) -> Worker:
        stacks = os.memfd_create(f"lockstep-stacks-{rank}")
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(meeting.getsockname()[1]),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            STARTED_BY_LOCKSTEP: "1",
            LAUNCHED: str(launched),
            SUPERVISOR: f"{os.getpid()} {self._board.descriptor} {stacks} {restarts}",
        }
        inherited = [self._board.descriptor, stacks]
        if rank == 0:
            inherited.append(meeting.fileno())
            environment[LISTENING] = str(meeting.fileno())
        # The workers share the cores; without this each would start a thread for every one of them.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
        # A session of their own: Ctrl-C reaches the supervisor alone, which asks all workers alike.
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.train", *arguments],
            env=environment,
            pass_fds=inherited,
            start_new_session=True,
        )
        return Worker(rank, process, stacks)

    def _running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.code is None]

    def _pass_on(self, signals: StopSignals) -> None:
        """A request to stop goes to every worker; a second Ctrl-C ends them at once."""
        new = signals.take()
        if new and signals.interrupts > 1:
            self.kill()
        elif new:
            for worker in self._running():
                worker.process.send_signal(signal.SIGTERM)

    def _note_end(self, worker: Worker) -> None:
        worker.last_word = self._board.last_word(worker.rank)
        ended_well = worker.code in (DONE, STOPPED_EARLY) and not worker.left_early
        if worker not in self._failed and not worker.killed_by_us and not ended_well:
            self._failed.append(worker)

    def _beats(self, hang: Hang | None = None) -> list[Beat]:
        """Where every rank is; the thread that saves, of those whose saving hangs."""
        saving = hang.ranks if hang is not None and hang.saving else ()
        return [self._board.beat(worker.rank, saving=worker.rank in saving) for worker in self.workers]

    def _examine(self, hang: Hang) -> _Examined:
        """Collects the stacks of all ranks that answer, and finds out which rank is the cause."""
        beats = self._beats(hang)  # now: being asked for its stacks may wake a rank up
        stopped, stacks = ask_for_stacks(self._running())
        return _Examined(find_cause(hang, stopped, stacks), hang.seconds, beats, stacks)

    def _examine_who_was_missed(self) -> _Examined | None:
        """Where all who failed did so because another did not come: which of those that still run it is. None where there is
        another reason, or nobody stands out."""
        left = [worker for worker in self._running() if not worker.killed_by_us]
        waited = [worker for worker in self._failed if worker.last_word == "waited in vain"]
        lost = [worker for worker in self._failed if worker.last_word in ("waited in vain", "lost contact")]
        if not left or not waited or lost != self._failed:
            return None
        beats = self._beats()
        stopped, stacks = ask_for_stacks(left)
        ranks = [worker.rank for worker in left]
        cause = find_missed(beats, [worker.rank for worker in waited], ranks, stopped, stacks)
        if cause is None:
            return None
        stacks |= {worker.rank: _read_all(worker.stacks) for worker in lost}
        return _Examined(cause, self._watch.still_seconds(cause[0]), beats, stacks)

    def _end(self, hang: _Examined | None) -> AttemptEnd:
        end = AttemptEnd(
            workers=self.workers,
            failed=self._failed,
            beats=self._beats() if hang is None else hang.beats,
            run_directory=self._board.run_directory,
        )
        if hang is not None:
            end.hung, end.hung_seconds, end.stacks = hang.cause, hang.seconds, hang.stacks
        return end


def ask_for_stacks(running: Sequence[Worker]) -> tuple[list[int], dict[int, str]]:
    """Which ranks' processes are stopped, and the stacks of those that answer."""
    stopped = [worker.rank for worker in running if _is_stopped(worker.process.pid)]
    asked = [worker for worker in running if worker.rank not in stopped]
    for worker in asked:
        worker.process.send_signal(STACKS_SIGNAL)
    stacks, sizes = dict[int, str](), dict[int, int]()
    still = dict.fromkeys((worker.rank for worker in asked), 0)
    for _ in range(_STACKS_LOOKS):
        if len(stacks) == len(asked):
            break
        time.sleep(_STACKS_LOOK_SECONDS)
        for worker in asked:
            size = os.fstat(worker.stacks).st_size
            still[worker.rank] = still[worker.rank] + 1 if size and sizes.get(worker.rank) == size else 0
            if still[worker.rank] == _STACKS_STILL_LOOKS:
                stacks[worker.rank] = _read_all(worker.stacks)
            sizes[worker.rank] = size
    return stopped, stacks


def _read_all(memory: int) -> str:
    return os.pread(memory, os.fstat(memory).st_size, 0).decode(errors="replace")


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "tT"
    return False
