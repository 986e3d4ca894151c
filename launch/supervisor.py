"""`lockstep train`: starts a worker per GPU or several on the CPU, and ends as they end. Imports no torch."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from launch.exit_codes import DO_NOT_RESTART, DONE, FAILED, STOPPED_EARLY, USAGE
from launch.stopping import STOP_SIGNALS
from launch.train import SUPERVISOR_PIPE

_POLL_SECONDS = 0.05
# How long the other workers may take to say their last words once one has ended badly.
_GRACE_SECONDS = 5.0
_DEFAULT_CPU_WORKERS = 2


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


def supervise(arguments: list[str], workers: int) -> int:
    """Runs `workers` workers with these arguments to their end and returns the run's exit code."""
    # Workers inherit the block and lift it once they listen: a request to stop is heard, however early it comes.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    group = _WorkerGroup(arguments, workers)
    for number in STOP_SIGNALS:
        signal.signal(number, group.on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return group.wait()


class _WorkerGroup:
    """The workers of one run on this host."""

    def __init__(self, arguments: list[str], workers: int) -> None:
        self._interrupted = False
        self._killed: set[int] = set()
        # Nobody ever writes: the workers see the end of the pipe when this process is gone, however it went.
        self._pipe = os.pipe()
        port = _free_port()
        self._processes = [self._start(arguments, rank, workers, port) for rank in range(workers)]

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """A request to stop goes to every worker; a second Ctrl-C ends them at once."""
        if number == signal.SIGINT and self._interrupted:
            self._kill()
        self._interrupted = self._interrupted or number == signal.SIGINT
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        deadline: float | None = None
        while any(process.poll() is None for process in self._processes):
            failed = [p for p in self._processes if p.poll() not in (None, DONE, STOPPED_EARLY)]
            if failed and deadline is None:
                deadline = time.monotonic() + _GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self._kill()
            time.sleep(_POLL_SECONDS)
        codes = [process.returncode for process in self._processes]
        for rank, code in enumerate(codes):
            if code < 0 and rank not in self._killed:
                print(f"lockstep: worker {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
        return _run_exit_code(codes)

    def _start(self, arguments: list[str], rank: int, workers: int, port: int) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(workers),
            "LOCAL_WORLD_SIZE": str(workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            SUPERVISOR_PIPE: str(self._pipe[0]),
        }
        # The workers share the cores; without this each would start a thread for every one of them.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
        # A session of their own: Ctrl-C reaches the supervisor alone, which asks all workers alike.
        return subprocess.Popen(
            [sys.executable, "-m", "launch.train", *arguments],
            env=environment,
            pass_fds=[self._pipe[0]],
            start_new_session=True,
        )

    def _kill(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.poll() is None:
                process.kill()
                self._killed.add(rank)


def _run_exit_code(codes: list[int]) -> int:
    """The run's code from its workers': the most telling one. A worker killed by a signal is a plain failure."""
    for telling in (USAGE, DO_NOT_RESTART):
        if telling in codes:
            return telling
    if all(code in (DONE, STOPPED_EARLY) for code in codes):
        return max(codes)
    return FAILED


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
